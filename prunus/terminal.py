"""Floor 5: what a person sees in a terminal: progress, notes, tables, errors; results on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prunus.launched import is_main
from prunus.progress import BarProgress, LineProgress, Progress, silent
from prunus.recording.artefact import write_text

LABEL = 30  # columns for the names of figures, where networks stand beside each other
PIPE_WIDTH = 160  # of tables in files and pipes, where there is no terminal to ask


class Terminal:
    """Where one command shows its work and its result; of several processes only the first one does."""

    def __init__(self, quiet: bool = False) -> None:
        self.is_main = is_main()  # asked now: processes that joined a training are forgotten at its end
        self.quiet = quiet or not self.is_main
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)

    def progress(self) -> Progress:
        """Bars on a terminal, a line for each step elsewhere, nothing with --quiet."""
        if self.quiet:
            return silent
        return BarProgress(self.err) if self.err.is_terminal else LineProgress(sys.stderr)

    def error(self, message: str) -> None:
        """One sentence, without a traceback."""
        self.err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=not self.err.is_terminal)

    def command(self, line: str) -> None:
        """A command to copy: never broken into lines."""
        self.err.print(Text(f"  {line}"), soft_wrap=True)

    def note(self, message: str) -> None:
        """Something that is worth knowing and stops nothing."""
        self.err.print(Text.assemble(("note: ", "yellow"), message), soft_wrap=not self.err.is_terminal)

    @contextlib.contextmanager
    def notes(self) -> Iterator[None]:
        """Shows what our loggers say, unless it is quiet; warnings always."""
        handler = _Notes(self)
        logger = logging.getLogger("prunus")
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if self.quiet else logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    def result(self, result: Mapping[str, Any], json_file: str | None, shown: Mapping[str, Any] | None = None) -> None:
        """Show a result as tables and lines, and write it whole to a JSON file (`-`: stdout, and nothing else).

        shown: what is shown in its place.
        """
        if not self.is_main:
            return
        text = json.dumps(_finite(result), indent=1) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
            return
        if json_file:
            write_text(Path(json_file), text)
        if not self.quiet:
            for part in rendered(result if shown is None else shown):
                self.out.print(part, soft_wrap=isinstance(part, Text))


def calm_libraries() -> None:
    """Hides what transformers shows while it loads: its bars and its warnings. Imports it; call it in a verb only."""
    from transformers.utils import logging as library

    library.disable_progress_bar()  # type: ignore[no-untyped-call]
    library.set_verbosity_error()  # type: ignore[no-untyped-call]


class _Notes(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.note(record.getMessage())


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False, emoji=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, emoji=False, width=PIPE_WIDTH)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


# ---------------------------------------------------------------------------------------------------------- results


def rendered(result: Mapping[str, Any]) -> Iterator[Table | Text | Figures]:
    """A table of networks where there are some; else `name value` lines, then tables of what has rows."""
    if "chosen" in result:
        yield networks([*([result["dense"]] if "dense" in result else []), *result["chosen"]])
        if result.get("front"):
            yield from front(result["front"])
    elif "ppl" in result:
        yield evaluation(result)
        if result.get("speed") and "against" not in result:
            yield pairs({f"{key} tokens/s": value for key, value in result["speed"].items()})
        if result.get("tasks"):
            yield Text()
            yield rows(result["tasks"])
            yield pairs({"mean": result["mean"], "standard error": result["mean_se"]})
    elif "methods" in result:
        yield from methods(result["methods"])
    else:
        facts = {key: value for key, value in result.items() if _is_fact(value) and key not in PLACES}
        if facts:
            yield pairs(facts)
        for value in result.values():
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                yield Text()
                yield rows(value)
    place = next((key for key in PLACES if key in result), None)
    if place:
        yield Text.assemble((f"{place}: ", "bold"), str(result[place]))


PLACES = ("picked", "report", "run")  # keys that say where the rest is; the first one closes the page


def _is_fact(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def evaluation(found: Mapping[str, Any]) -> Figures:
    """The figures of one checkpoint, below those of the model that it was held against."""
    against, speed = found.get("against"), found.get("speed") or {}
    text = f"perplexity\n{Path(found['text']).name}, {found['chunks']} x {found['length']} tokens"
    network = {
        "name": found["checkpoint"],
        "parameters": found["parameters"]["all"],
        "n_bytes": found.get("bytes_on_disk") or found["bytes_in_memory"],
        "perplexity": {text: found["ppl"]},
        "kl_nats": found.get("kl_nats"),
        "kl_se": found.get("kl_se"),
        "agreement": found.get("agreement"),
    }
    if against is None:
        return networks([network])
    network |= {
        "kept_all": found["parameters"]["all"] / against["parameters"]["all"],
        "kept_blocks": found["parameters"]["blocks"] / against["parameters"]["blocks"],
        "prefill_speedup": speed.get("prefill"),
        "decode_speedup": speed.get("decode"),
    }
    dense = {
        "name": found.get("against_name", "against"),
        "parameters": against["parameters"]["all"],
        "perplexity": {text: against["ppl"]},
    }
    return networks([dense, network])


def front(found: Mapping[str, Any]) -> Iterator[Table | Text]:
    """The points of a front of several objectives, with the numbers by which one is picked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    own, axes = found["searched"]["front"], found["objectives"]
    for title in ("point", "kept of blocks", *(["parameters"] if "parameters" not in axes else []), *axes):
        table.add_column(title, justify="right")
    for row in own:
        size = [f"{row['parameters']:,}"] if "parameters" not in axes else []
        values = (_objective(axis, row["values"][axis], row["errors"][axis]) for axis in axes)
        table.add_row(str(row["point"]), _percent(row["kept"]), *size, *values)
    yield Text()
    yield table
    sides = (("hypervolume", "searched"), ("of a random search", "control"))
    yield pairs({name: found[side]["hypervolume"] for name, side in sides})
    if own:
        yield Text("`prunus pick RUN --point N` makes a checkpoint of a point")


def _objective(axis: str, value: float, error: float | None) -> str:
    if axis == "bytes":
        return _bytes(value)
    if axis in ("parameters", "flops"):
        return f"{value:,.0f}" if axis == "parameters" else f"{value / 1e9:.4g} G"
    return f"{_number(value)} ms" if axis == "latency" else _with_error(value, error)


Cell = Callable[[Mapping[str, Any]], str]


def networks(found: Sequence[Mapping[str, Any]]) -> Figures:
    """Dense and compressed networks beside each other; what was not measured is a dash, or has no column."""
    axes = list(dict.fromkeys(axis for n in found for axis in n.get("in_front", {})))
    texts = list(dict.fromkeys(text for n in found for text in n.get("perplexity", {})))
    columns: list[tuple[str, Cell]] = [
        ("kept of blocks", lambda n: _percent(n.get("kept_blocks"))),
        ("kept of all", lambda n: _percent(n.get("kept_all"))),
        ("parameters", lambda n: _millions(n.get("parameters"))),
        ("weights", lambda n: _bytes(n.get("n_bytes"))),
        *((f"{axis}\nin the front", _in_front(axis)) for axis in axes),
        ("predicted KL", lambda n: _foretold(n.get("predicted_kl_nats"), n.get("predicted_factor"))),
        ("with KV cache", lambda n: _bytes(n.get("memory_bytes"))),
        ("ms by the table", lambda n: _number(n.get("predicted_ms"))),
        ("measured", lambda n: _number(n.get("measured_ms"))),
        ("speed-up by the table", lambda n: _times(n.get("predicted_speedup"))),
        ("measured", lambda n: _times(n.get("measured_speedup"))),
        ("KL (nats)", lambda n: _with_error(n.get("kl_nats"), n.get("kl_se"))),
        *((text if text.startswith("perplexity") else f"perplexity\n{text}", _perplexity_on(text)) for text in texts),
        ("same word", lambda n: _percent(n.get("agreement"))),
        ("prefill", lambda n: _times(n.get("prefill_speedup"))),
        ("decode", lambda n: _times(n.get("decode_speedup"))),
    ]
    measured = [(title, cell) for title, cell in columns if any(cell(n) != "–" for n in found)]
    rows = [[str(n["name"]), *(cell(n) for _, cell in measured)] for n in found]
    return Figures(["network", *(title for title, _ in measured)], rows)


@dataclass(frozen=True)
class Figures:
    """A row for each network; where that is too wide for the terminal, a column for each, in as many tables as needed.

    Nothing is cut off: a name or a figure of which a part is missing is worth nothing.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        upright = self._table(self.titles, self.rows)
        unbounded = options.update(max_width=10_000)
        if Measurement.get(console, unbounded, upright).maximum <= options.max_width:
            yield upright
            return
        heads = [title.replace("\n", ", ") for title in self.titles]
        column = 2 + max(len(cell) for row in self.rows for cell in row)
        label = min(max(map(len, heads)), LABEL)
        some = max(1, (options.max_width - label) // column)
        for first in range(0, len(self.rows), some):
            lying = list(zip(heads, *self.rows[first : first + some], strict=True))
            yield Text() if first else Text(end="")
            yield self._table(lying[0], lying[1:], label)

    def _table(self, head: Sequence[str], body: Sequence[Sequence[str]], label: int | None = None) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for n, title in enumerate(head):
            side: Literal["left", "right"] = "right" if n else "left"
            table.add_column(title, justify=side, no_wrap=n > 0, overflow="fold", max_width=None if n else label)
        for row in body:
            table.add_row(*row)
        return table


def _in_front(axis: str) -> Cell:
    return lambda n: _objective(axis, *n["in_front"][axis]) if "in_front" in n else "–"


def _perplexity_on(text: str) -> Cell:
    return lambda n: _number(n.get("perplexity", {}).get(text))


def methods(found: Sequence[Mapping[str, Any]]) -> Iterator[Table | Text]:
    """The methods of a bench: what each does, and below that its paper, and whom it serves where not all."""
    heads = {True: "structured: the networks get smaller", False: "masks: weights become zero, the size stays"}
    widest = max(len(one["name"]) for one in found)
    for structured, head in heads.items():
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold", no_wrap=True, min_width=widest)
        table.add_column()
        for one in found:
            if one["smaller network"] is structured:
                served, _, only = one["serves"].partition("; ")
                facts = [*([] if one["paper"] == "none" else [one["paper"]])]
                facts += [*([] if served == "all families" else [f"serves {served}"]), *([only] if only else [])]
                below = "; ".join(facts)
                table.add_row(one["name"], Text.assemble(one["what it does"], (f"\n{below}" if below else "", "dim")))
        yield Text(head if structured else f"\n{head}", style="underline")
        yield table


def of_bench(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a bench as a terminal has room for them."""
    values = [key for key in rows[0] if key.startswith("ppl")]
    return [
        {
            "method": row["method"], "calibration": row.get("calibration", ""),
            "kept": row.get("kept_blocks", row["kept"]),
            **{key: row.get(key) for key in values}, "seconds": row.get("seconds"),
            "note": row.get("refused", ""),
        }
        for row in rows
    ]  # fmt: skip


def rows(found: Sequence[Mapping[str, Any]]) -> Table:
    """A list of alike rows; numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for n, key in enumerate(found[0] if found else ()):
        side: Literal["left", "right"] = "left" if isinstance(found[0][key], str) else "right"
        table.add_column(key.removesuffix("_bytes").replace("_", " "), justify=side, no_wrap=n == 0, overflow="fold")
    for row in found:
        table.add_row(*(_value(key, value) for key, value in row.items()))
    return table


def pairs(facts: Mapping[str, Any]) -> Table:
    """Names and values."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        name = "size" if key == "file_bytes" else key.removesuffix("_bytes").replace("_", " ")
        table.add_row(name, _value(key, value))
    return table


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("bytes"):
        return _bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    return _number(value) if isinstance(value, float) else "–" if value is None else str(value)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _millions(n: int | None) -> str:
    return "–" if n is None else f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n:,}"


def _bytes(n: float | None) -> str:
    return "–" if n is None else f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.4g}" if abs(x) < 1e4 else f"{x:.3g}"


def _with_error(x: float | None, error: float | None) -> str:
    return _number(x) if x is None or error is None else f"{_number(x)} ± {error:.2g}"


def _foretold(x: float | None, factor: float | None) -> str:
    return _number(x) if x is None or factor is None else f"{_number(x)} ± {100 * (factor - 1):.0f} %"


def _times(x: float | None) -> str:
    return "–" if x is None else f"{x:.2f}×"
