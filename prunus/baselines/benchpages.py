"""Floor 4: what a person reads after a bench: bench.json, its tables in bench.md and its picture. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from prunus.baselines.table import OURS
from prunus.recording import pictures, tables
from prunus.recording.artefact import write_text
from prunus.recording.pictures import GREY, INK, MARKS, STYLE

FAR = 30.0  # times the dense perplexity: what is worse is not drawn

CORE = {"across_format": ".0%", "format": ".2f", "best": "min", "reference": ["dense"]}


def views(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the rows are shown: a table for every perplexity and calibration, one for the costs, one for refusals."""
    found: dict[str, Any] = {}
    pivot = {"title": "kept of the blocks", "index": "method", "across": "kept", **CORE}
    sources = list(dict.fromkeys(row["calibration"] for row in rows if "calibration" in row))
    values = [key for key in rows[0] if key.startswith("ppl")] if rows else []
    for source in sources:
        for structured, kind in ((True, ""), (False, "-masks")):
            where = {"calibration": source, "done": True, "structured": structured}
            if not any(all(row.get(k) == v for k, v in where.items()) for row in rows):
                continue
            own = {**pivot, "where": where}
            of_masks = "" if structured else " Zeros in a dense network: neither smaller nor faster as it stands."
            for key in values:
                length, _, text = key.removeprefix("ppl").partition("_")
                of = f" of {text}" if text else ""
                note = f"Perplexity, windows of {length} tokens{of}; calibrated on {source}. Dense: {rows[0][key]:.2f}."
                found[f"{key}-{source}{kind}"] = {**own, "value": key, "note": note + of_masks}
            if any("task_mean" in row for row in rows):
                note = f"Mean score of the tasks; calibrated on {source}. Dense: {rows[0].get('task_mean', 0.0):.4f}."
                shown = {"value": "task_mean", "best": "max", "format": ".4f", "note": note + of_masks}
                found[f"tasks-{source}{kind}"] = {**own, **shown}
    found["cost"] = {"where": {"done": True}, "columns": COSTS}
    if any("refused" in row for row in rows):
        columns = [["method", "method", ""], ["kept", "kept", ".0%"], ["refused", "refused, because", ""]]
        found["refused"] = {"where": {"done": False}, "columns": columns}
    return found


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
    """bench.json, bench.png, bench.svg and bench.md in a directory; returns the path of bench.md."""
    write_text(out / "bench.json", json.dumps(data, indent=1) + "\n")
    parts = ["# Rival methods and ours"]
    if any(row.get("done") for row in data["rows"]):
        pictures.save(picture(data["rows"]), out / "bench")
        parts.append("![perplexity against size](bench.png)")
    parts += [f"## {name}\n\n{tables.view(data, name, 'bench.json')}" for name in data["views"]]
    write_text(out / "bench.md", "\n\n".join(parts) + "\n")
    return out / "bench.md"


def picture(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity against what is kept, a line for each method, a panel for each calibration; ours is the thick one.

    Masks are grey: their networks are not smaller. Points of more than FAR times the dense perplexity are left out.
    """
    value = next(key for key in rows[0] if key.startswith("ppl"))
    dense, done = rows[0][value], [row for row in rows if row.get("done")]
    sources = list(dict.fromkeys(row["calibration"] for row in done))
    methods = list(dict.fromkeys(row["method"] for row in done))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * len(sources) + 2.2, 5.6), layout="constrained")
        axes = figure.subplots(1, len(sources), squeeze=False)[0]
        for ax, source in zip(axes, sources, strict=True):
            ax.axhline(dense, color=GREY, linewidth=1, linestyle=":", label="dense")
            for number, method in enumerate(methods):
                own = [r for r in done if r["method"] == method and r["calibration"] == source]
                points = sorted((100 * r["kept_blocks"], r[value]) for r in own if r[value] < FAR * dense)
                if points:
                    style = _style(number, method, bool(own[0].get("structured")))
                    ax.plot(*zip(*points, strict=True), label=method, **style)
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
            ax.set_title(f"calibrated on {source}")
            ax.set_xlabel("kept of the decoder blocks (%)")
            ax.set_ylabel(f"perplexity, windows of {value.removeprefix('ppl')} tokens")
        handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside right upper")
        return figure


def _style(number: int, method: str, structured: bool) -> dict[str, Any]:
    if method == OURS:
        return {"color": INK, "marker": "*", "linewidth": 2.6, "markersize": 10, "zorder": 5}
    colour, marker = MARKS[number % len(MARKS)]
    line = ("-", "--", ":", "-.")[number // len(MARKS) % 4]
    colour = colour if structured else "#b9b9b9"
    return {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1.2, "markersize": 5}
