"""Floor 4: the picture of a searched front beside its random-search control, from plain numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from prunus.recording.pictures import BLUE, GREY, INK, STYLE

NUMBERED = 60  # points of a front that carry their numbers; more would hide the picture
APART = (0.025, 0.035)  # shares of the panel's width and height that two numbers take
COUNTED = ("parameters", "bytes", "flops")  # large numbers: axes in thousands, millions, ...


def searched_front(found: Mapping[str, Any]) -> Figure:
    """The front that a search has found beside that of a random search with as many evaluations, on held-out text.

    found: what RUN/search/front.json holds. One panel for every two of the objectives; faint points are all that was
    tried, judged on the search's own text, and those far above both fronts are left out.
    """
    names, titles = list(found["objectives"]), list(found["titles"])
    pairs = [(x, y) for y in range(len(names)) for x in range(y + 1, len(names))]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(pairs), 4.8), layout="constrained")
        for ax, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
            _front_panel(ax, found, (names[x], names[y]), (x, y), joined=len(names) == 2)
            ax.set_xlabel(titles[x])
            ax.set_ylabel(titles[y])
        figure.axes[0].set_title(f"{found['evaluations']} evaluations each")
        figure.axes[0].legend(loc="upper right", handletextpad=0.4)
        return figure


def _front_panel(ax: Axes, found: Mapping[str, Any], names: tuple[str, str], at: tuple[int, int], joined: bool) -> None:
    """Two objectives: everything tried, both fronts with their standard errors, and the dense model."""
    shown = []
    for side, colour, marker, label in (("control", GREY, "x", "random search"), ("searched", BLUE, "o", "")):
        one = found[side]
        tried = np.array([[row[k] for k in at] for row in one["tried"]]).reshape(-1, 2)
        style: dict[str, Any] = {} if marker == "x" else {"edgecolors": "none"}
        ax.scatter(tried[:, 0], tried[:, 1], s=18, color=colour, marker=marker, alpha=0.25, zorder=2, **style)
        points = sorted(tuple(row["values"][name] for name in names) for row in one["front"])
        rows = sorted(one["front"], key=lambda row: tuple(row["values"][name] for name in names))
        errors = [[row["errors"][name] or 0.0 for row in rows] for name in names]
        share = f"{label or found['method']}, hypervolume {one['hypervolume']:.3f}"
        ax.errorbar(
            [p[0] for p in points], [p[1] for p in points], xerr=errors[0], yerr=errors[1], color=colour, marker=marker,
            markersize=7, markeredgecolor=colour if marker == "x" else "white", capsize=2, zorder=4, label=share,
            linewidth=1.5 if joined else 0, elinewidth=1,
        )  # fmt: skip
        shown += points
    dense = tuple(found["dense"][k] for k in at)
    whole = "full network" if any("trained" in title for title in found["titles"]) else "dense"
    ax.scatter([dense[0]], [dense[1]], s=95, marker="*", color=INK, zorder=7, clip_on=False, label=whole)
    ax.set_xlim(*_around([p[0] for p in (*shown, dense)]))
    ax.set_ylim(*_around([p[1] for p in (*shown, dense)]))
    for axis, name in zip((ax.xaxis, ax.yaxis), names, strict=True):
        if name in COUNTED:
            axis.set_major_formatter(EngFormatter(sep=" "))
    if len(found["searched"]["front"]) <= NUMBERED:
        _numbers(ax, found["searched"]["front"], names)


def _numbers(ax: Axes, front: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> None:
    """The numbers of the points, but of those whose number would lie on another."""
    low, span = np.array([(a, b - a) for a, b in (ax.get_xlim(), ax.get_ylim())]).T
    taken: list[np.ndarray] = []
    for row in front:
        at_point = tuple(row["values"][name] for name in names)
        place = (np.array(at_point) - low) / span
        if any((abs(place - other) < APART).all() for other in taken):
            continue
        taken.append(place)
        ax.annotate(
            str(row["point"]), at_point, (5, 5), textcoords="offset points", fontsize=7, color=INK, zorder=8,
            annotation_clip=True,
        )  # fmt: skip


def _around(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin
