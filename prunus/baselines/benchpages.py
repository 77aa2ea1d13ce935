"""Floor 4: what a person reads after a bench: bench.json, its tables in bench.md and its picture. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunus.baselines.table import OURS
from prunus.recording import pictures, tables
from prunus.recording.artefact import write_text
from prunus.recording.pictures import GREY, INK, MARKS, STYLE

FAR = 30.0  # times the dense perplexity: what is worse is not drawn

CORE = {"across_format": ".0%", "format": ".2f", "best": "min", "reference": ["dense"]}


def views(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How rows are shown: a table for every perplexity and for the mean of the tasks, of each calibration and, where
    there are several, of all together; one of every task, one of the costs, one of refusals."""
    found: dict[str, Any] = {}
    sources = list(dict.fromkeys(row["calibration"] for row in rows if "calibration" in row))
    if len(sources) > 1:
        texts = "; calibrated on the text after the comma."
        lines = {"index": "network", "among": "calibration"}
        found |= _shares(rows, {"done": True, "structured": True}, lines, "", texts)
    for source in sources:
        for structured, kind in ((True, ""), (False, "-masks")):
            where = {"calibration": source, "done": True, "structured": structured}
            if any(all(row.get(k) == v for k, v in where.items()) for row in rows):
                found |= _shares(rows, where, {"index": "method"}, f"-{source}{kind}", f"; calibrated on {source}.")
    if names := list(rows[0].get("tasks", {})) if rows else []:
        titles = [["method", "method", ""], ["calibration", "calibrated on", ""], ["kept", "kept", ".0%"]]
        means = [["task_mean", "mean", ".3f", "task_mean_se"]]
        if gains := any("task_gain" in row for row in rows):
            means.append(["task_gain", "against the dense", "+.3f", "task_gain_se"])
        most = max(one["n"] for one in rows[0]["tasks"].values())
        found["tasks"] = {
            "where": {"scored": True},
            "columns": [*titles, *([f"task_{name}", name, ".3f", f"task_{name}_se"] for name in names), *means],
            "note": f"Scores, {NORMED}; of each task the first {most} questions at most." + (PAIRED if gains else ""),
        }
    found["cost"] = {"where": {"done": True}, "columns": COSTS}
    if took := [row["row_seconds"] for row in rows if "row_seconds" in row]:
        minutes = f"{sum(took) / 60:.1f} minutes"
        found["cost"]["note"] = f"{len(took)} rows in {minutes}, with what their networks were scored and timed for."
        if shared := sum("timed_with" in row for row in rows):
            found["cost"]["note"] += f" Speeds of {shared} rows are those of an earlier network with the same shapes."
    if any("refused" in row for row in rows):
        columns = [["method", "method", ""], ["kept", "kept", ".0%"], ["refused", "refused, because", ""]]
        found["refused"] = {"where": {"done": False}, "columns": columns}
    return found


def _shares(
    rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], lines: Mapping[str, str], name: str, texts: str
) -> dict[str, Any]:
    """Tables with a column for each share: one for each perplexity, one for the tasks' mean score."""
    own = {"title": "kept of the blocks", **lines, "across": "kept", **CORE, "where": where}
    masks = "" if where["structured"] else " Zeros in a dense network: neither smaller nor faster as it stands."
    found = {}
    for key, what in measures(rows[0]).items():
        note = f"Perplexity, {what}{texts} Dense: {rows[0][key]:.2f}.{masks}"
        found[f"{key}{name}"] = {**own, "value": key, "note": note}
    if any("task_mean" in row for row in rows):
        dense = rows[0].get("task_mean", 0.0)
        note = f"Mean score of the tasks, ± its standard error{texts} Dense: {dense:.3f}.{masks}"
        shown = {"value": "task_mean", "error": "task_mean_se", "best": "max", "format": ".3f"}
        found[f"tasks{name or '-all'}"] = {**own, **shown, "note": note}
    return found


NORMED = "`acc_norm` where lm-eval has it, ± their standard errors"
PAIRED = " The last column's errors are those of the same questions asked of both models."
COSTS = [
    ["method", "method", ""],
    ["calibration", "calibrated on", ""],
    ["kept", "asked", ".0%"],
    ["kept_blocks", "kept of the blocks", ".2%"],
    ["kept_all", "of all", ".2%"],
    ["parameters", "parameters", ",d"],
    ["seconds", "seconds", ",.1f"],
    ["forward_tokens", "forward tokens", ",d"],
    ["peak_mb", "peak memory, MB", ",.0f"],
    ["weights_mb", "weights, MB", ",.0f"],
    ["prefill_speedup", "prefill speed", ".2f"],
    ["decode_speedup", "decode speed", ".2f"],
    ["decoded", "decoded, tokens/s", ".1f"],
]


def write(out: Path, data: Mapping[str, Any]) -> Path:
    """bench.json, bench.md and their pictures (PNG and SVG) in a directory; returns the path of bench.md."""
    write_text(out / "bench.json", json.dumps(data, indent=1) + "\n")
    parts = ["# Rival methods and ours"]
    if any(row.get("done") for row in data["rows"]):
        pictures.save(picture(data["rows"]), out / "bench")
        parts.append("![perplexity against size](bench.png)")
    if timed := [row for row in data["rows"] if row.get("structured") and "prefill_speedup" in row]:
        pictures.save(speeds(data["rows"][0], timed), out / "bench-speed")
        parts.append("![quality against speed, speed and memory against size](bench-speed.png)")
    parts += [f"## {name}\n\n{tables.view(data, name, 'bench.json')}" for name in data["views"]]
    write_text(out / "bench.md", "\n\n".join(parts) + "\n")
    return out / "bench.md"


def measures(row: Mapping[str, Any]) -> dict[str, str]:
    """The perplexities of a row by their keys ("ppl2048", of the second text "ppl2048_c4"), each in words."""
    texts = list(row.get("perplexity", {}))
    found = {}
    for key in (key for key in row if key.startswith("ppl")):
        length, _, text = key.removeprefix("ppl").partition("_")
        name = text or (texts[0] if texts else "")
        found[key] = f"windows of {length} tokens{f' of {name}' if name else ''}"
    return found


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity against what is kept: a line for each method, a panel for each calibration (columns) and text (rows).

    Ours is the thick line. Masks are grey: their networks are not smaller. Windows of the first length asked for;
    points of more than FAR times the dense perplexity are left out.
    """
    known = measures(rows[0])
    values = [key for key in known if key.partition("_")[0] == next(iter(known))]
    done = [row for row in rows if row.get("done")]
    sources = list(dict.fromkeys(row["calibration"] for row in done))
    styles: dict[str, dict[str, Any]] = {}
    for row in done:
        styles.setdefault(row["method"], _style(len(styles), row["method"], bool(row.get("structured"))))
    with mpl.rc_context(STYLE):
        size = (5.6 * len(sources) + 2.2, 5.2 * len(values) + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(values), len(sources), squeeze=False, sharey="row")
        for line, value in zip(axes, values, strict=True):
            for ax, source in zip(line, sources, strict=True):
                _panel(ax, [r for r in done if r["calibration"] == source], styles, value, rows[0][value])
                ax.set_title(f"calibrated on {source}")
            line[0].set_ylabel(f"perplexity, {known[value]}")
        return _with_legend(figure)


def speeds(dense: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What the networks are worth on this device: quality against the speed of a prompt (Sukthanker et al. 2024, figure
    1), speed of decoding and megabytes of weights against what is kept (Shen et al. 2024, figure 7).

    dense: the dense model's row. rows: those of smaller networks whose speed was measured; one line for each method and
    calibration. Quality is the mean score of the tasks, ± its standard error, where there are tasks (then against size
    too), else perplexity, of the first length and text.
    """
    value = next(iter(measures(dense)))
    quality = "task_mean" if all("task_mean" in row for row in rows) else value
    near = rows if quality == "task_mean" else [row for row in rows if row[value] < FAR * dense[value]]
    good = "mean score of the tasks" if quality == "task_mean" else f"perplexity, {measures(dense)[value]}"
    size = "kept of the decoder blocks (%)"
    panels: list[tuple[Sequence[Mapping[str, Any]], str, str, str, str]] = [
        (near, "prefill_speedup", "prompt, times as fast as the dense model", quality, good),
        *([(rows, "kept_blocks", size, quality, good)] if quality == "task_mean" else []),
        (rows, "kept_blocks", size, "decode_speedup", "decoding, times as fast as the dense model"),
        (rows, "kept_blocks", size, "weights_mb", "weights, MB"),
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sources = list(dict.fromkeys(row["calibration"] for row in rows))
    lines = list(dict.fromkeys((row["method"], row["calibration"]) for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 5.2), layout="constrained")
        for ax, (shown, x, what, y, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for line in lines:
                own = [row for row in shown if (row["method"], row["calibration"]) == line]
                points = [((100 if x == "kept_blocks" else 1) * row[x], row[y], row.get(f"{y}_se")) for row in own]
                if points:
                    xs, ys, errors = zip(*sorted(points), strict=True)
                    style = _style(methods.index(line[0]), line[0], True)
                    if len(sources) > 1:  # of methods so few that only calibrations need dashes
                        style |= {"linestyle": ("-", "--", ":", "-.")[sources.index(line[1]) % 4]}
                    ax.plot(xs, ys, label=", ".join(line) if len(sources) > 1 else line[0], **style)
                    if None not in errors:
                        ax.errorbar(xs, ys, errors, fmt="none", ecolor=style["color"], elinewidth=0.8)
            if dense.get(y):
                ax.axhline(dense[y], color=GREY, linewidth=1, linestyle=":", label="dense")
            if y == value:
                _logarithmic(ax)
            ax.set_xlabel(what)
            ax.set_ylabel(scale)
        return _with_legend(figure)


def _with_legend(figure: Figure) -> Figure:
    """One legend beside all panels."""
    named = [ax.get_legend_handles_labels() for ax in figure.axes]
    handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def _logarithmic(ax: Axes) -> None:
    """Perplexities, in plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")


def _panel(
    ax: Axes, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, Mapping[str, Any]], value: str, dense: float
) -> None:
    ax.axhline(dense, color=GREY, linewidth=1, linestyle=":", label="dense")
    for method, style in styles.items():
        points = [(100 * r["kept_blocks"], r[value]) for r in rows if r["method"] == method and r[value] < FAR * dense]
        if points:
            ax.plot(*zip(*sorted(points), strict=True), label=method, **style)
    _logarithmic(ax)
    ax.set_xlabel("kept of the decoder blocks (%)")


def _style(number: int, method: str, structured: bool) -> dict[str, Any]:
    if method == OURS:
        return {"color": INK, "marker": "*", "linewidth": 2.6, "markersize": 10, "zorder": 5}
    colour, marker = MARKS[number % len(MARKS)]
    line = ("-", "--", ":", "-.")[number // len(MARKS) % 4]
    colour = colour if structured else "#b9b9b9"
    return {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1.2, "markersize": 5}
