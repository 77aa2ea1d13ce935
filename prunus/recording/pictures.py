"""Floor 4: the pictures of a report, drawn from plain numbers: PNG and SVG, without a browser or a display.

Colours are Okabe and Ito's, which people with any kind of colour vision can tell apart; every method has a marker of
its own too. No torch, and no global state of matplotlib: each picture is a `Figure` of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prunus.recording.artefact import flush, place, writing
from prunus.timing.timetable import Timetable

INK, GREY, BLUE = "#1b1b1b", "#8c8c8c", "#0072B2"
MARKS: tuple[tuple[str, str], ...] = (  # colour and marker of each method, in the order of their first candidate
    ("#E69F00", "o"),
    ("#009E73", "s"),
    ("#CC79A7", "D"),
    ("#D55E00", "^"),
    ("#56B4E9", "v"),
)
STYLE: Any = {  # Any: matplotlib's stubs name every legal key
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b0b0b0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "svg.hashsalt": "prunus",  # the same numbers give the same file
}


class Network(TypedDict):
    """One network, dense or compressed, and what was measured on it; a figure that is absent was not measured."""

    name: str
    kept_blocks: float  # share of the parameters inside the decoder layers
    kept_all: float  # share of all parameters
    parameters: int
    n_bytes: int  # of its weights as saved
    hidden: int
    layers: list[tuple[int, int, int]]  # (kv_heads, q_per_kv, mlp) of every layer of the dense model; zeros are dropped
    kl_nats: NotRequired[float]  # KL(dense || this) per token on held-out tokens
    kl_se: NotRequired[float]  # its standard error
    perplexity: NotRequired[dict[str, float]]  # text and protocol, in words -> perplexity
    prefill_speedup: NotRequired[float]  # seconds of the dense model / seconds of this one, same process
    decode_speedup: NotRequired[float]
    speed: NotRequired[dict[str, Any]]  # the same as a `SpeedRatio`, with tokens per second of both
    timed_on: NotRequired[str]  # the machine, in words, and the device
    memory_bytes: NotRequired[int]  # weights and KV cache, where the budget is memory
    predicted_ms: NotRequired[float]  # one request by the table of the device, where the budget is time
    predicted_speedup: NotRequired[float]
    measured_ms: NotRequired[float]  # the same request, measured in turns with the dense model
    measured_speedup: NotRequired[float]  # median of ratios of neighbouring runs
    predicted_tps: NotRequired[float]  # tokens decoded in a second
    measured_tps: NotRequired[float]
    uniform: NotRequired[bool]  # a stock configuration, loads without Prunus
    in_front: NotRequired[dict[str, tuple[float, float | None]]]  # of a point of a front: objective -> value, its error
    path: NotRequired[str]  # of the checkpoint, from the run directory
    sample: NotRequired[str]  # what it writes after the report's prompt


class Tried(TypedDict):
    """One candidate of a search, at the largest token budget that it was judged on."""

    method: str
    kept: float  # share kept, of whatever the report's `keep_of` says
    kl_nats: float  # on the search's tokens


class Step(TypedDict):
    """What one step of the run cost."""

    name: str
    seconds: float
    forward_tokens: int
    peak_bytes: int  # peak memory of the process while the step ran
    peak_cuda_bytes: NotRequired[int]  # the same on a GPU


class ErrorCurve(TypedDict):
    """Reconstruction error of one sub-layer at every nested level, relative to its output's energy."""

    layer: int
    part: Literal["attention", "mlp"]
    kept: list[float]
    error: list[float]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, each whole or not at all, and return their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for ending, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
        path = stem.with_name(f"{stem.name}.{ending}")
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        with writing(path, partial), mpl.rc_context(STYLE):
            figure.savefig(partial, format=ending, bbox_inches="tight", pad_inches=0.15, **options)
            flush(partial)
            place(partial, path)
        paths.append(path)
    return paths


# ------------------------------------------------------------------------------------------------------------- front


def front(
    dense: Network,
    chosen: Sequence[Network],
    tried: Sequence[Tried] = (),
    keep_of: Literal["blocks", "all"] = "blocks",
    far: str = "the dense model",
) -> Figure:
    """Quality against size: divergence from `far` with every candidate tried, and perplexity where it was measured.

    A panel is left out when nothing was measured for it; candidates far above the chosen networks are counted at the
    upper edge instead of squeezing the rest.
    """
    text = next((label for n in (dense, *chosen) for label in n.get("perplexity", {})), None)
    show_kl = bool(tried) or any("kl_nats" in n for n in chosen)
    panels = int(show_kl) + int(text is not None)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.2 * max(panels, 1), 4.6), layout="constrained")
        axes = figure.subplots(1, max(panels, 1), squeeze=False)[0]
        if show_kl:
            _kl_panel(axes[0], dense, chosen, tried, keep_of)
            axes[0].set_ylabel(f"KL to {far} (nats per token)")
            axes[0].set_title(f"Distance to {far}")
        if text is not None:
            _perplexity_panel(axes[-1], dense, chosen, text, keep_of)
        for ax in axes:
            ax.set_xlabel(f"kept of {'the decoder blocks' if keep_of == 'blocks' else 'all parameters'} (%)")
            ax.set_xlim(*_x_limits([*(_kept(n, keep_of) for n in chosen), *(100 * t["kept"] for t in tried)]))
        return figure


def _kept(network: Network, keep_of: Literal["blocks", "all"]) -> float:
    return 100 * (network["kept_blocks"] if keep_of == "blocks" else network["kept_all"])


def _x_limits(kept: Sequence[float]) -> tuple[float, float]:
    low = min(kept, default=50.0)
    margin = max(0.08 * (100 - low), 2.0)
    return low - margin, 100 + margin


def _kl_panel(
    ax: Axes, dense: Network, chosen: Sequence[Network], tried: Sequence[Tried], keep_of: Literal["blocks", "all"]
) -> None:
    measured = sorted((n for n in chosen if "kl_nats" in n), key=lambda n: _kept(n, keep_of))
    highest = max((n["kl_nats"] for n in measured), default=0.0)
    top = 1.6 * highest or 1.1 * max((t["kl_nats"] for t in tried if np.isfinite(t["kl_nats"])), default=0.0) or 1.0
    _square_root_scale(ax, top)
    _tried_dots(ax, tried, top)
    line_x = [_kept(n, keep_of) for n in measured]
    ax.errorbar(
        line_x,
        [n["kl_nats"] for n in measured],
        yerr=[n.get("kl_se", 0.0) for n in measured],
        color=BLUE,
        marker="o",
        markersize=8,
        markeredgecolor="white",
        linewidth=1.8,
        capsize=2,
        zorder=5,
        label="chosen, held-out tokens",
    )
    for n in measured:
        label = f"{n['parameters'] / 1e6:.4g} M"
        ax.annotate(label, (_kept(n, keep_of), n["kl_nats"]), (7, 7), textcoords="offset points", fontsize=9, zorder=6)
    _dense_mark(ax, dense, 0.0, (-8, 9))
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper right", handletextpad=0.4)


def _square_root_scale(ax: Axes, top: float) -> None:
    """A scale that shows the dense model's zero and still tells small divergences apart."""
    forward: Callable[[Any], Any] = lambda v: np.sqrt(np.maximum(v, 0.0))  # noqa: E731
    ax.set_yscale("function", functions=(forward, np.square))
    ax.set_ylim(0, top)
    marks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)]
    shown = [0.0]
    for mark in marks:  # a tick needs room on the square-root scale
        if mark <= top and np.sqrt(mark / top) - np.sqrt(shown[-1] / top) > 0.07:
            shown.append(mark)
    ax.set_yticks(shown, [f"{v:g}" for v in shown])
    ax.minorticks_off()


def _tried_dots(ax: Axes, tried: Sequence[Tried], top: float) -> None:
    counts = Counter(t["method"] for t in tried)
    marks = iter(MARKS * (1 + len(counts) // len(MARKS)))
    for method, n in counts.items():
        colour, marker = (GREY, "x") if method == "random" else next(marks)
        x = np.array([100 * t["kept"] for t in tried if t["method"] == method])
        y = np.array([t["kl_nats"] for t in tried if t["method"] == method])
        above = ~(y < top)
        above_crowd = 2 + 1 / (1 + n)  # a few dots are drawn over many
        label = f"{method}, tried ({n}{f', {above.sum()} off the scale' if above.any() else ''})"
        alpha = float(np.clip(12 / np.sqrt(n) / 4, 0.25, 0.8))
        style: dict[str, Any] = {} if marker == "x" else {"edgecolors": "none"}
        ax.scatter(
            x[~above],
            y[~above],
            s=22,
            color=colour,
            marker=marker,
            alpha=alpha,
            label=label,
            zorder=above_crowd,
            **style,
        )
        ax.scatter(x[above], np.full(above.sum(), 0.99 * top), s=14, color=colour, marker="2", alpha=alpha, zorder=2)


def _dense_mark(ax: Axes, dense: Network, value: float, offset: tuple[int, int]) -> None:
    ax.scatter([100], [value], s=95, marker="*", color=INK, zorder=7, clip_on=False)
    label = f"dense, {dense['parameters'] / 1e6:.4g} M"
    ax.annotate(label, (100, value), offset, textcoords="offset points", ha="right", fontsize=9, zorder=7)


def _perplexity_panel(
    ax: Axes, dense: Network, chosen: Sequence[Network], text: str, keep_of: Literal["blocks", "all"]
) -> None:
    measured = sorted((n for n in chosen if text in n.get("perplexity", {})), key=lambda n: _kept(n, keep_of))
    values = [n["perplexity"][text] for n in measured]
    ax.plot(
        [_kept(n, keep_of) for n in measured],
        values,
        color=BLUE,
        marker="o",
        markersize=8,
        markeredgecolor="white",
        linewidth=1.8,
        zorder=5,
    )
    for n, value in zip(measured, values, strict=True):
        at = (_kept(n, keep_of), value)
        ax.annotate(f"{value:.4g}", at, (7, 7), textcoords="offset points", fontsize=9, zorder=6)
    base = dense.get("perplexity", {}).get(text)
    if base is not None:
        ax.axhline(base, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.5, zorder=1)
        _dense_mark(ax, dense, base, (-8, -14))
        ax.annotate(f"{base:.4g}", (100, base), (-4, 9), textcoords="offset points", ha="right", fontsize=9)
    lowest, highest = min([*values, base or np.inf]), max([*values, base or 0.0])
    ax.set_yscale("log")
    ax.set_ylim(lowest / 1.25, highest * 1.3)
    marks = [m * 10.0**e for e in range(7) for m in (1, 1.5, 2, 3, 4, 5, 7)]
    shown = [m for m in marks if lowest / 1.25 <= m <= highest * 1.3]
    ax.set_yticks(shown, [f"{m:g}" for m in shown])
    ax.minorticks_off()
    ax.set_ylabel("perplexity")
    ax.set_title(f"Perplexity: {text}")


# ------------------------------------------------------------------------------------------------------------- draws


def sizes(drawn: Mapping[str, Sequence[int]], least: float, most: float) -> Figure:
    """How the sizes of drawn networks are spread: one histogram for each way of drawing, over the same bins.

    drawn: counts of equally wide bins between `least` and `most` parameters, by the name of the sampler.
    Sukthanker et al. 2024 (arXiv:2410.06479v1, figure 2a-b) show with it what bins cure.
    """
    colours = (GREY, BLUE, *(colour for colour, _ in MARKS))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.0 * len(drawn) + 0.4, 3.8), layout="constrained")
        axes = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
        for ax, colour, (name, counts) in zip(axes, colours, drawn.items(), strict=False):
            edges = np.linspace(least / 1e6, most / 1e6, len(counts) + 1)
            shares = 100 * np.asarray(counts) / max(1, sum(counts))
            ax.bar(edges[:-1], shares, width=np.diff(edges), align="edge", color=colour, edgecolor="white", lw=0.8)
            empty = int((np.asarray(counts) == 0).sum())
            most_in_one = f"{shares.max():.0f} % of {sum(counts):,} draws in the fullest bin"
            ax.set_title(name)
            ax.annotate(f"{most_in_one}\n{empty} of {len(counts)} bins empty", (0.98, 0.97), xycoords="axes fraction",
                        ha="right", va="top", fontsize=9)  # fmt: skip
            ax.set_xlabel("parameters (millions)")
            ax.set_xlim(edges[0], edges[-1])
        axes[0].set_ylabel("share of the draws (%)")
        axes[0].set_ylim(0, axes[0].get_ylim()[1] * 1.12)
        return figure


# -------------------------------------------------------------------------------------------------------------- kept


def kept(dense: Network, chosen: Sequence[Network]) -> Figure:
    """What each chosen network kept in every layer: query heads as KV groups x heads per group, and MLP neurons.

    A dropped sub-layer is an empty, hatched cell.
    """
    n_layers, n_rows = len(dense["layers"]), len(chosen)
    widest = max(len(f"{kv}×{q}") for kv, q, _ in dense["layers"])
    with mpl.rc_context(STYLE):
        cell = 0.34 if n_layers <= 40 else 0.2
        width = max(7.0, 1.8 + cell * n_layers)
        figure = Figure(figsize=(width, 1.9 + 0.68 * n_rows), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        colours = mpl.colormaps["YlGnBu"]
        heads = [[kv * q / (d[0] * d[1]) for (kv, q, _), d in _pairs(n, dense)] for n in chosen]
        neurons = [[m / d[2] for (_, _, m), d in _pairs(n, dense)] for n in chosen]
        head_words = [[f"{kv}×{q}" for kv, q, _ in n["layers"]] for n in chosen]
        neuron_words = [[f"{100 * share:.0f}" for share in row] for row in neurons]
        font = 7.0 if widest <= 3 else 6.0
        _cells(axes[0], heads, head_words, colours, font if n_layers <= 40 else None)
        _cells(axes[1], neurons, neuron_words, colours, 7.0 if n_layers <= 40 else None)
        full = next((d for d in dense["layers"] if d[0]), (0, 0, 0))
        axes[0].set_title(f"Attention: KV groups × query heads in each (dense {full[0]}×{full[1]})")
        axes[1].set_title(f"MLP: neurons kept, % (dense {max(d[2] for d in dense['layers'])})")
        axes[1].set_xlabel("decoder layer (hatched: the sub-layer is dropped)")
        axes[1].set_xticks(range(0, n_layers, max(1, round(n_layers / 30))))
        for ax in axes:
            ax.set_yticks(range(n_rows), [_row_label(n, dense) for n in chosen])
        scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), colours)
        bar = figure.colorbar(scale, ax=axes, aspect=24, pad=0.015, format=lambda v, _: f"{100 * v:.0f} %")
        bar.set_label("share kept")
        bar.outline.set_visible(False)
        return figure


def _pairs(network: Network, dense: Network) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    return list(zip(network["layers"], dense["layers"], strict=True))


def _row_label(network: Network, dense: Network) -> str:
    cut = network["hidden"] != dense["hidden"]
    return network["name"] + (f"\nhidden {network['hidden']} of {dense['hidden']}" if cut else "")


def _cells(
    ax: Axes, shares: list[list[float]], words: list[list[str]], colours: mpl.colors.Colormap, font: float | None
) -> None:
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            box = (x - 0.46, y - 0.43)
            if share == 0:
                ax.add_patch(Rectangle(box, 0.92, 0.86, facecolor="white", edgecolor="#b5b5b5", hatch="/////", lw=0.6))
                continue
            ax.add_patch(Rectangle(box, 0.92, 0.86, facecolor=colours(share), edgecolor="none"))
            if font is not None:
                colour = "white" if share > 0.55 else INK
                ax.text(x, y, words[y][x], ha="center", va="center", fontsize=font, color=colour)
    ax.set_xlim(-0.6, len(shares[0]) - 0.4)
    ax.set_ylim(len(shares) - 0.4, -0.6)


# -------------------------------------------------------------------------------------------------------------- cost


def cost(steps: Sequence[Step]) -> Figure:
    """Seconds, forward tokens and peak memory of every step, as bars with their figures."""
    columns: list[tuple[str, str, list[float], str]] = [
        ("Time", BLUE, [s["seconds"] for s in steps], "{:,.3g} s"),
        ("Forward tokens", "#009E73", [s["forward_tokens"] / 1e3 for s in steps], "{:,.4g} k"),
        ("Peak memory", "#E69F00", [s["peak_bytes"] / 1e9 for s in steps], "{:.2f} GB"),
    ]
    on_gpu = [s.get("peak_cuda_bytes", 0) / 1e9 for s in steps]
    if any(on_gpu):
        columns.append(("Peak GPU memory", "#CC79A7", on_gpu, "{:.2f} GB"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.0 + 0.36 * len(steps)), layout="constrained")
        axes = figure.subplots(1, len(columns), sharey=True)
        for ax, (title, colour, values, form) in zip(axes, columns, strict=True):
            ax.barh(range(len(steps)), values, color=colour, height=0.66)
            for y, value in enumerate(values):
                ax.annotate(form.format(value), (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
            ax.set_xlim(0, 1.32 * (max(values, default=0) or 1))
            ax.set_title(title)
            ax.grid(visible=False)
            ax.tick_params(length=0)
            ax.set_xticks([])
            ax.spines["bottom"].set_visible(False)
            ax.set_yticks(range(len(steps)), [s["name"] for s in steps])
        axes[0].invert_yaxis()
        return figure


# ------------------------------------------------------------------------------------------------------------ errors


def errors(curves: Sequence[ErrorCurve]) -> Figure:
    """Relative reconstruction error of every sub-layer against the share it keeps, one line per layer."""
    parts = [p for p in ("attention", "mlp") if any(c["part"] == p for c in curves)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(parts) + 0.8, 4.0), layout="constrained")
        axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        last = max(c["layer"] for c in curves)
        colours, scale = mpl.colormaps["viridis"], mpl.colors.Normalize(0, max(last, 1))
        for ax, part in zip(axes, parts, strict=True):
            for curve in (c for c in curves if c["part"] == part):
                x = [100 * k for k in curve["kept"]]
                ax.plot(x, [100 * e for e in curve["error"]], color=colours(scale(curve["layer"])), lw=1.3, alpha=0.85)
            ax.set_title("Attention" if part == "attention" else "MLP")
            ax.set_xlabel("kept (%)")
            ax.set_ylim(0, 100)
        axes[0].set_ylabel("reconstruction error (% of the output's energy)")
        bar = figure.colorbar(mpl.cm.ScalarMappable(scale, colours), ax=list(axes), pad=0.02, label="decoder layer")
        bar.outline.set_visible(False)
        return figure


# ----------------------------------------------------------------------------------------------------------- latency


def staircase(table: Timetable) -> Figure:
    """Milliseconds of every width that was measured, for the prompt and for one decoding step.

    Each part stands in a layer without the other. The line through nothing and the full width is what a cost in
    proportion to parameters would say.
    """
    grid, heads = table.grid, [(kv, q) for kv in table.grid.kv_heads for q in table.grid.q_per_kv]
    heads.sort(key=lambda pair: (pair[0] * pair[1], pair[0]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        axes = figure.subplots(2, 2)
        for row, (times, title) in enumerate(((table.prefill, "prompt"), (table.decode, "one decoding step"))):
            rows = {kv: dict(zip(grid.q_per_kv, times.attention[i], strict=True)) for i, kv in enumerate(grid.kv_heads)}
            attention, mlp = axes[row]
            mlp.plot([0, grid.mlp[-1]], [times.empty, times.mlp[-1]], color=GREY, lw=1, ls=(0, (4, 3)))
            mlp.plot(grid.mlp, times.mlp, color=BLUE, marker="o", markersize=4, lw=1.4)
            mlp.set_title(f"MLP, {title}")
            mlp.set_xlabel("neurons")
            attention.bar(range(len(heads)), [rows[kv][q] for kv, q in heads], color="#009E73", width=0.72)
            attention.set_xticks(range(len(heads)), [f"{kv}×{q}" for kv, q in heads], rotation=90 * (len(heads) > 12))
            attention.set_title(f"Attention, {title}")
            attention.set_xlabel("KV groups × query heads in each")
            for ax in (attention, mlp):
                ax.axhline(times.empty, color=INK, lw=1, alpha=0.5)
                ax.set_ylim(bottom=0)
            attention.set_ylabel("ms, its layer's frame included")
            attention.annotate("empty layer", (1, times.empty), (-2, 3), xycoords=("axes fraction", "data"),
                               textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
        return figure


def front_of_times(dense: Network, chosen: Sequence[Network], far: str = "the dense model") -> Figure:
    """Quality against milliseconds: KL to the dense model, where the table puts each network and where it was found."""
    shown = sorted((n for n in chosen if "predicted_ms" in n and "kl_nats" in n), key=lambda n: n["predicted_ms"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 4.6), layout="constrained")
        ax = figure.subplots()
        _square_root_scale(ax, 1.6 * max((n["kl_nats"] for n in shown), default=1.0) or 1.0)
        found = [n for n in shown if "measured_ms" in n]
        for n in found:
            ax.plot([n["predicted_ms"], n["measured_ms"]], [n["kl_nats"]] * 2, color=GREY, lw=1, zorder=3)
        ax.plot([n["predicted_ms"] for n in shown], [n["kl_nats"] for n in shown], color=BLUE, marker="o",
                markersize=8, markerfacecolor="white", lw=1.4, zorder=4, label="by the table")  # fmt: skip
        ax.scatter([n["measured_ms"] for n in found], [n["kl_nats"] for n in found], color=BLUE, s=55, zorder=5,
                   label="measured")  # fmt: skip
        for n in shown:
            ax.annotate(n["name"], (n["predicted_ms"], n["kl_nats"]), (7, 7), textcoords="offset points", fontsize=9)
        if "predicted_ms" in dense:
            ax.scatter([dense["predicted_ms"]], [0.0], s=95, marker="*", color=INK, zorder=7, clip_on=False)
            ax.annotate("dense", (dense["predicted_ms"], 0.0), (-8, 9), textcoords="offset points", ha="right")
        ax.set_xlabel("milliseconds of one request")
        ax.set_ylabel(f"KL to {far} (nats per token)")
        ax.set_title("Quality against time")
        ax.legend(loc="upper right")
        return figure
