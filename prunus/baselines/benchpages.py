"""Floor 4: what a person reads after a bench: bench.json, its tables in bench.md and its picture. No torch."""

from __future__ import annotations

import json
import math
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunus.baselines.table import OURS
from prunus.recording import pictures, tables
from prunus.recording.artefact import write_text
from prunus.recording.pictures import BLUE, GREY, INK, STYLE

FAR = 30.0  # times the dense perplexity: what is worse is not drawn
SAME = 0.01  # lines that are nowhere further apart, relatively, are drawn as one
SPANNED = ("--methods", "--keep", "--calibration", "--text", "--out", "--no-speed")  # options that say nothing of a row
WIDTH, LINE, LETTER = 6.2, 0.145, 0.064  # inches: of a panel; of a line of names and a letter of it
SHARE = "kept of the decoder blocks (%)"
ORANGE, VERMILION, RUST, GREEN, LIME, ASH = "#E69F00", "#D55E00", "#8C2D04", "#009E73", "#7FA800", "#A6A6A6"
LOOKS: Mapping[str, tuple[str, Any]] = {  # in every picture: the colour of its kind, a marker of its own
    OURS: (BLUE, "*"),
    "magnitude": ("#C9A066", "8"),
    "wanda-sp": (ORANGE, "s"),
    "wanda-sp-dense": (ORANGE, "D"),
    "flap": (VERMILION, "o"),
    "flap-nobias": (VERMILION, "p"),
    "llm-pruner": (RUST, "^"),
    "llm-pruner-second": (RUST, "<"),
    "llm-pruner-mix": (RUST, "v"),
    "llm-pruner-vector": (RUST, ">"),
    "llm-pruner-channel": ("#CC79A7", "h"),
    "slicegpt": ("#882E9C", "P"),
    "shortgpt": (GREEN, "X"),
    "angular": ("#55B89A", (4, 1, 0)),
    "laco": (LIME, "H"),
    "laco-released": (LIME, (5, 0, 180)),
    "sleb": ("#00614A", (4, 1, 45)),
    "blockpruner": ("#4C7A00", (6, 1, 0)),
    "shen": (INK, "d"),
    "random": ("#6E6E6E", (3, 1, 0)),
    "mask-magnitude": (ASH, "x"),
    "mask-magnitude-2:4": (ASH, "1"),
    "mask-wanda": (ASH, "+"),
    "mask-wanda-2:4": (ASH, "2"),
    "mask-sparsegpt": (ASH, (6, 2, 0)),
    "mask-sparsegpt-2:4": (ASH, "3"),
}

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


def view(data: Mapping[str, Any], wanted: str, origin: str) -> str:
    """One view of a bench as Markdown, as `tables.view` has it, and below it which rows were made otherwise than the
    file says. Tokens per second of several machines are no column: they do not compare."""
    name = wanted or next(iter(data["views"]))
    one = data["views"][name]
    rows = [row for row in data["rows"] if all(row.get(k) == v for k, v in one.get("where", {}).items())]
    if "columns" in one and len({_place(row) for row in rows if "decoded" in row}) > 1:
        one = {**one, "columns": [column for column in one["columns"] if column[0] != "decoded"]}
    told = otherwise(data, rows)
    return tables.view({**data, "views": {name: one}}, name, origin) + (f" {told}" if told else "")


def otherwise(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Which rows have another machine, thread count, version or setting than the file, in a sentence; "" if none."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_other(data, row), []).append(row)
    groups.pop("", None)
    parts = [f"{_whose(some, rows)} ({words})" for words, some in groups.items()]
    return f"Made otherwise: {'; '.join(parts)}." if parts else ""


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a row was made: two rows of one place can be compared by their seconds."""
    return row.get("machine"), row.get("threads"), row.get("device"), *sorted(row.get("versions", {}).items())


def _other(data: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    own, file = (_settings(one.get("command", data["command"])) for one in (row, data))
    both = (("with", [one for one in own if one not in file]), ("without", [one for one in file if one not in own]))
    found = [f"{word} `{' '.join(some)}`" for word, some in both if some]
    words = {"machine": "on {}", "threads": "threads: {}", "device": "on {}"}
    found += [word.format(row[k]) for k, word in words.items() if k in row and row[k] != data.get(k, row[k])]
    known = data.get("versions", {})
    return ", ".join(found + [f"{k} {v}" for k, v in row.get("versions", {}).items() if known.get(k, v) != v])


def _settings(command: str) -> list[str]:
    """What a command of a bench sets for its rows: every option with its values, but those of `SPANNED`."""
    return [option for option in re.split(r" (?=--)", command)[1:] if option.split()[0] not in SPANNED]


def _whose(some: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows among others: by their methods, else their calibrations too, else their shares too."""
    if len(some) == len(rows):
        return "all rows"
    names: dict[str, dict[str, None]] = {}  # what tells rows of a method apart -> the methods
    for row in some:
        own = [other for other in rows if other["method"] == row["method"]]
        near = [other for other in own if other.get("calibration") == row.get("calibration")]
        known = f" on {row.get('calibration')}" + ("" if all(r in some for r in near) else f" at {row['kept']:.0%}")
        names.setdefault("" if all(r in some for r in own) else known, {})[row["method"]] = None
    return " and ".join(", ".join(methods) + known for known, methods in names.items())


def write(out: Path, data: Mapping[str, Any]) -> Path:
    """bench.json, bench.md and their pictures (PNG and SVG) in a directory; returns the path of bench.md."""
    write_text(out / "bench.json", json.dumps(data, indent=1) + "\n")
    parts = ["# Rival methods and ours"]
    if any(row.get("done") for row in data["rows"]):
        pictures.save(picture(data["rows"]), out / "bench")
        parts.append("![perplexity against size](bench.png)")
    if any(row.get("structured") and "prefill_speedup" in row for row in data["rows"]):
        pictures.save(
            speeds(data["rows"][0], [row for row in data["rows"] if row.get("structured")]), out / "bench-speed"
        )
        parts.append("![quality against speed, speed and memory against size](bench-speed.png)")
    parts += [f"## {name}\n\n{view(data, name, 'bench.json')}" for name in data["views"]]
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

    Ours is the thick line; masks are grey, for their networks are not smaller. Windows of the first length asked for;
    points of more than FAR times the dense perplexity are left out, and named below their panel.
    """
    known = measures(rows[0])
    values = [key for key in known if key.partition("_")[0] == next(iter(known))]
    done = [row for row in rows if row.get("done")]
    sources = list(dict.fromkeys(row["calibration"] for row in done))
    most = max(len({row["method"] for row in done if row["calibration"] == source}) for source in sources)
    height = max(4.2, LINE * most * 1.5)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=((WIDTH + 0.7) * len(sources), (height + 1.0) * len(values)), layout="constrained")
        axes = figure.subplots(len(values), len(sources), squeeze=False, sharey="row")
        for line, value in zip(axes, values, strict=True):
            dense = rows[0][value]
            shown = [dense, *(row[value] for row in done if row[value] < FAR * dense)]
            for ax, source in zip(line, sources, strict=True):
                _logarithmic(ax)
                ax.set_ylim(min(shown) / 1.08, max(shown) * 1.12)
                _panel(ax, [row for row in done if row["calibration"] == source], value, dense, height)
                ax.set_title(f"calibrated on {source}")
            line[0].set_ylabel(f"perplexity, {known[value]}")
        return figure


def _panel(ax: Axes, rows: Sequence[Mapping[str, Any]], value: str, dense: float, height: float) -> None:
    """height: of the axes, in inches."""
    ax.axhline(dense, color=GREY, linewidth=1, linestyle=":", label="dense")
    ax.annotate("dense", (0.995, dense), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=8, color="#555555")  # fmt: skip
    lines: dict[tuple[tuple[float, float], ...], list[str]] = {}  # methods with the same points
    ruined: dict[float, list[str]] = {}  # by the share asked for
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        points = sorted((100 * row["kept_blocks"], row[value]) for row in own if row[value] < FAR * dense)
        if points:
            ax.plot(*zip(*points, strict=True), label=method, **_style(method))
            lines.setdefault(tuple(points), []).append(method)
        for row in (row for row in own if row[value] >= FAR * dense):
            ruined.setdefault(row.get("kept", row["kept_blocks"]), []).append(method)
    if lines:
        _names(ax, lines, height)
    _ticks(ax, rows)
    ax.set_xlabel(SHARE)
    if ruined:
        far = [f"at {share:.0%} {', '.join(ruined[share])}" for share in sorted(ruined, reverse=True)]
        note = textwrap.fill(f"Above {FAR * dense:.0f}, not drawn: {'; '.join(far)}.", 92, break_on_hyphens=False)
        ax.annotate(note, (0, 0), (0, -36), xycoords="axes fraction", textcoords="offset points", va="top",
                    fontsize=7.5, color="#555555")  # fmt: skip


def _names(ax: Axes, lines: Mapping[tuple[tuple[float, float], ...], Sequence[str]], height: float) -> None:
    """The names of lines at their left ends, those of lone points of the largest share right of them, none on another,
    and room for them. height: of the axes, in inches."""
    every = [x for points in lines for x, _ in points]
    first, last = min(every), max(every)
    columns: dict[tuple[float, bool], list[tuple[float, float, Sequence[str]]]] = {}
    for ((x, y), *_), methods in lines.items():
        right = last - x < 2 < last - first
        edge = first if x - first < 2 else last if right else x
        columns.setdefault((round(edge), right), []).append((y, x, methods))
    room = [0.35, 0.35]
    for (x, right), found in columns.items():
        if right or x == round(first):
            room[right] = max(room[right], *(0.35 + LETTER * len(", ".join(methods)) for *_, methods in found))
    inch = max(last - first, 1.0) / max(1.5, WIDTH - sum(room))
    ax.set_xlim(first - room[0] * inch, last + room[1] * inch)
    low, high = (math.log(limit) for limit in ax.get_ylim())
    for (_, right), found in columns.items():
        found.sort(key=lambda one: one[0])
        wanted = [(math.log(y) - low) / (high - low) for y, *_ in found]
        for place, (y, x, methods) in zip(spread(wanted, LINE / height), found, strict=True):
            colour = LOOKS.get(methods[0], (GREY, "o"))[0]
            at = (x + (0.25 if right else -0.25) * inch, math.exp(low + place * (high - low)))
            ax.annotate(
                ", ".join(methods), (x, y), at, ha="left" if right else "right", va="center", fontsize=8, zorder=8,
                color="#6b6b6b" if colour == ASH else colour, weight="bold" if OURS in methods else "normal",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
                path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places between 0 and 1 that are at least `gap` apart, with the least sum of squared distances from those wanted.

    wanted: in rising order. Where there is no room for all, those on top are above 1.
    """
    blocks: list[tuple[float, int]] = []  # runs that touch each other: the mean of where their first would be, how many
    for number, place in enumerate(wanted):
        mean, count = place - number * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        blocks.append((mean, count))
    first = [mean for mean, count in blocks for _ in range(count)]
    most = max(0.0, 1 - gap * (len(first) - 1))
    return [min(max(0.0, place), most) + number * gap for number, place in enumerate(first)]


def speeds(dense: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What the networks are worth on this device: quality against the time of a prompt (Sukthanker et al. 2024, figure
    1), tokens generated in a second and megabytes of weights against what is kept (Shen et al. 2024, figure 7).

    dense: the dense model's row. rows: those of smaller networks; a panel shows those that have what it shows, one line
    for each method and calibration. Quality is the mean score of the tasks, ± its standard error, where there are tasks
    (then against parameters too), else perplexity, of the first length and text. Milliseconds and tokens per second are
    of one machine, the one of most rows: ratios to the dense model, which were measured in turns, times the dense
    model's speed there, for that alone swings with what else the machine does.
    """
    value = next(iter(measures(dense)))
    timed = [row for row in rows if "prefill_speedup" in row]
    scored = all("task_mean" in row for row in timed)
    quality = "task_mean" if scored else value
    good = (quality, "mean score of the tasks" if scored else f"perplexity, {measures(dense)[value]}")
    here = Counter(map(_place, timed)).most_common(1)[0][0]
    one = [row for row in timed if _place(row) == here]
    base = dense_speed(one)
    whole = _shown({**dense, "prefill_speedup": 1.0, "decode_speedup": 1.0, "kept_blocks": 1.0}, base)
    same, every = ([_shown(row, base) for row in some] for some in (one, rows))
    near = [row for row in every if scored or row[value] < FAR * dense[value]]
    share, alone = ("share", SHARE), len(one) == len(timed)
    prompt = ("prompt", "milliseconds for 1,000 tokens of a prompt")
    if not base or not alone:  # compares over machines, as no time does
        prompt = ("prefill_speedup", "prompt, times as fast as the dense model")
    size = ("millions", "all parameters (millions)") if all("parameters" in row for row in every) else share
    decoding = ("generated", "decoding, tokens/s") if base else ("decode_speedup", "decoding, times as fast")
    where = SHARE if alone or not base else f"{SHARE}; rows of {here[0]}, threads: {here[1]}"
    panels = [
        *([(every, size, good)] if scored else []),
        (near, prompt, good),
        (same if base else every, ("share", where), decoding),
        (every, share, ("weights_mb", "weights, MB")),
    ]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.8, 9.4), layout="constrained")
        for number, (shown, (x, across), (y, up)) in enumerate(panels):
            ax = figure.add_subplot(2, 2, number + 1)
            _curves(ax, shown, (x, y), joined=y == "weights_mb", aside=scored and (x, across) == size)
            _dense(ax, whole, x, y, level=y == quality)
            if y == value:
                _logarithmic(ax)
            ax.set(xlabel=across, ylabel=up)
            if x == "share":
                _ticks(ax, [row for row in (*shown, whole) if y in row])
        _legend(figure, free=len(panels) < 4)
        return figure


def dense_speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens per second of the dense model: the median of what was measured in turns with `rows`; {} if unknown."""
    own = [row["speed"]["dense"] for row in rows if "speed" in row and "timed_with" not in row]
    return {key: statistics.median(one[key] for one in own) for key in ("prefill", "decode")} if own else {}


def _shown(row: Mapping[str, Any], base: Mapping[str, float]) -> dict[str, Any]:
    """A row with what is drawn of it. base: tokens per second of the dense model."""
    found = {**row, "share": 100 * row["kept_blocks"], "millions": row.get("parameters", math.nan) / 1e6}
    if base and "prefill_speedup" in row:
        prompt, generated = (row[f"{key}_speedup"] * base[key] for key in ("prefill", "decode"))
        found |= {"prompt": 1e6 / prompt, "generated": generated}
    return found


def _curves(
    ax: Axes, rows: Sequence[Mapping[str, Any]], keys: tuple[str, str], joined: bool = False, aside: bool = False
) -> None:
    """One line for each method and calibration. keys: of x and y. joined: lines that coincide are one. aside: those of
    one x stand beside each other, so that their errors can be seen."""
    x, y = keys
    rows = [row for row in rows if x in row and y in row]
    sources = list(dict.fromkeys(row["calibration"] for row in rows))
    lines: dict[tuple[str, str], list[tuple[float, float, float | None]]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["calibration"]), []).append((row[x], row[y], row.get(f"{y}_se")))
    for points in lines.values():
        points.sort()
    width = max((row[x] for row in rows), default=0.0) - min((row[x] for row in rows), default=0.0)
    if joined:
        _joined(ax, lines)
    for number, ((method, source), points) in enumerate(lines.items() if not joined else ()):
        xs, ys, errors = zip(*points, strict=True)
        style = _style(method)
        if len(sources) > 1:  # of methods so few that only calibrations need dashes
            style |= {"linestyle": ("-", "--", ":", "-.")[sources.index(source) % 4]}
        if aside:
            xs = tuple(v + 0.03 * width * (number - (len(lines) - 1) / 2) for v in xs)
        ax.plot(xs, ys, label=f"{method}, {source}" if len(sources) > 1 else method, **style)
        if None not in errors:
            ax.errorbar(xs, ys, errors, fmt="none", ecolor=style["color"], elinewidth=1.2, capsize=3)


def _joined(ax: Axes, lines: Mapping[tuple[str, str], Sequence[tuple[float, float, Any]]]) -> None:
    """Lines that coincide as one, with the names of all beside it."""
    every = list(dict.fromkeys(method for method, _ in lines))
    for group in coincident({key: [(x, y) for x, y, _ in points] for key, points in lines.items()}):
        methods = [method for method in every if method in dict(group)]
        others = ", ".join(method for method in every if method not in methods)
        many = len(methods) > max(3, len(every) / 2)
        name = (f"all but {others}" if others else "all methods") if many else ", ".join(methods)
        style = _style(methods[0]) if len(methods) == 1 else {"color": INK, "marker": "o", "markersize": 5}
        points = [(x, y) for x, y, _ in lines[group[0]]]
        ax.plot(*zip(*points, strict=True), label=name, **style)
        middle = np.mean([points[(len(points) - 1) // 2], points[len(points) // 2]], axis=0)
        ax.annotate(
            name, tuple(middle), (8, -8), textcoords="offset points", va="top", fontsize=9, color=style["color"]
        )


def coincident(lines: Mapping[tuple[str, str], Iterable[tuple[float, float]]]) -> list[list[tuple[str, str]]]:
    """The keys of lines in groups: all points of a group are within SAME of its first line, drawn straight on."""
    known = {key: np.array([*points]) for key, points in lines.items()}
    groups: list[list[tuple[str, str]]] = []
    for key, own in sorted(known.items(), key=lambda one: -len(one[1])):
        for group in groups:
            first = known[group[0]]
            straight = np.polyval(np.polyfit(first[:, 0], first[:, 1], min(1, len(first) - 1)), own[:, 0])
            if bool((abs(straight - own[:, 1]) <= SAME * own[:, 1]).all()):
                group.append(key)
                break
        else:
            groups.append([key])
    return groups


def _dense(ax: Axes, whole: Mapping[str, Any], x: str, y: str, level: bool) -> None:
    """The dense model: a ring where it was measured, and the level of its quality."""
    if level and whole.get(y):
        ax.axhline(whole[y], color=GREY, linewidth=1, linestyle=":", label="dense")
    if x in whole and y in whole:
        ring: dict[str, Any] = {
            "marker": "o",
            "facecolors": "white",
            "edgecolors": INK,
            "linewidths": 1.6,
            "label": "dense",
        }
        ax.scatter([whole[x]], [whole[y]], s=60, zorder=7, **ring)
        if error := whole.get(f"{y}_se"):
            ax.errorbar([whole[x]], [whole[y]], [error], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)


def _legend(figure: Figure, free: bool) -> None:
    """One legend for all panels but the last, in the order of the first panel's last values. free: a cell has none."""
    last = {str(line.get_label()): float(np.asarray(line.get_ydata())[-1]) for line in figure.axes[0].lines}
    named = [ax.get_legend_handles_labels() for ax in figure.axes[:-1]]
    handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
    labels = sorted(handles, key=lambda label: -last.get(label, -math.inf))
    beside, above = {"loc": "upper left", "bbox_to_anchor": (0.6, 0.45)}, {"loc": "outside upper left", "ncols": 6}
    where: dict[str, Any] = beside if free else above
    figure.legend([handles[label] for label in labels], labels, fontsize=10, **where)


def _ticks(ax: Axes, rows: Iterable[Mapping[str, Any]]) -> None:
    """Marks along an axis of shares, at those that were asked for."""
    ax.set_xticks(sorted({round(100 * row.get("kept", row["kept_blocks"])) for row in rows}))


def _logarithmic(ax: Axes) -> None:
    """Perplexities, in plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")


def _style(method: str) -> dict[str, Any]:
    """How a method's line looks, in every picture."""
    colour, marker = LOOKS.get(method, (GREY, "o"))
    size = (
        {"linewidth": 2.8, "markersize": 12, "zorder": 5} if method == OURS else {"linewidth": 1.3, "markersize": 7.5}
    )
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.5} if colour != ASH else {"markeredgewidth": 1.4}
    return {"color": colour, "marker": marker, **size, **edge}
