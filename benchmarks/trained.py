"""What training adds to a front: docs/pictures/trained.png, of results/compress.json and results/train.json.

    python benchmarks/render.py

draws it with the tables. Left, perplexity against size: the front without training, the networks of one trained
super-network, and one network that was trained further by itself. Right, the mean accuracy of the tasks of which the
dense model knows more than which answer is the commoner one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from prunus.recording import pictures

GUESSED = ("winogrande", "boolq")  # where the dense model is at chance or below what one answer alone would have
DENSE, RECOVERED, SUPER = "base", "keep-0.8-trained", "super-"


def kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The measured checkpoints by what was done to them."""
    return {
        "without training": [row for row in rows if not row["trained"]],
        "trained super-network": [row for row in rows if row["checkpoint"].startswith(SUPER)],
        "one network, trained further": [row for row in rows if row["checkpoint"] == RECOVERED],
    }


def mean(row: Mapping[str, Any]) -> tuple[float, float]:
    """The mean accuracy of the tasks that are not guessed, and its standard error."""
    tasks = [key for key in row if f"{key}_se" in row and key not in (*GUESSED, "mean") and "nats" not in key]
    return sum(row[t] for t in tasks) / len(tasks), math.hypot(*(row[f"{t}_se"] for t in tasks)) / len(tasks)


def picture(results: Path) -> Figure:
    """Both panels. results: the directory of the results files."""
    measured = json.loads((results / "train.json").read_text(encoding="utf-8"))["rows"]
    measured = [row for row in measured if row["part"] == "recover"]
    untrained = json.loads((results / "compress.json").read_text(encoding="utf-8"))["rows"]
    dense = next(row for row in measured if row["checkpoint"] == DENSE)
    front = [row for row in untrained if row.get("calibration") == "wikitext2" and row.get("full")]
    with mpl.rc_context(pictures.STYLE):
        figure = Figure(figsize=(11.6, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (kind, rows) in enumerate(kinds(measured).items()):
            colour, marker = pictures.MARKS[number]
            style = {"color": colour, "marker": marker, "linestyle": "none" if len(rows) == 1 else "-", "label": kind}
            shown = [dense, *front] if kind == "without training" else rows
            points = sorted((row["parameters"] / 1e6, row["ppl2048"]) for row in shown)
            left.plot(*zip(*points, strict=True), **style)
            aside = 0.5 * (number - 1)  # bars of networks of one size would hide each other
            scores = [(row["parameters"] / 1e6 + aside, *mean(row)) for row in rows]
            x, y, errors = zip(*sorted(scores), strict=True)
            right.errorbar(x, y, errors, capsize=3, elinewidth=0.8, **style)
        left.axhline(dense["ppl2048"], color=pictures.GREY, linewidth=1, linestyle=":", label="dense")
        right.axhline(mean(dense)[0], color=pictures.GREY, linewidth=1, linestyle=":", label="dense")
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
        left.set_ylabel("perplexity, WikiText-2 test, 40 windows of 2048 tokens")
        right.set_ylabel("mean accuracy of five tasks, ± s.e.")
        for ax in (left, right):
            ax.set_xlabel("all parameters (millions)")
        left.legend()
        return figure
