"""Floor 3: from reformed errors to nats: what each level of each sub-layer costs in KL, alone.

The error curves, weighted by the curvature of the loss, predict the divergence of every level. One measured level of
each sub-layer (a short forward, the layers before it shared) tells where they mislead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from prunus.models.costs import Layout, sublayer_parameters
from prunus.reforming.levels import Errors
from prunus.searching.objective import Divergence
from prunus.searching.space import SearchSpace
from prunus.subnetwork import LayerShape, SubNetwork

Which = Literal["attention", "mlp"]
AttentionLevel = tuple[int, int]
T = TypeVar("T")
TINY = 1e-9
WHICH: tuple[Which, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Curve:
    """The levels of one sub-layer with their cost (parameters) and their divergence (nats)."""

    layer: int
    which: Which
    levels: tuple[AttentionLevel, ...] | tuple[int, ...]
    costs: tuple[float, ...]
    nats: tuple[float, ...]


@dataclass(frozen=True)
class Anchor:
    """One measured level: its reformed error and its KL."""

    layer: int
    which: Which
    error: float
    nats: float


def with_level(sub: SubNetwork, layer: int, level: AttentionLevel | int) -> SubNetwork:
    """The sub-network with one sub-layer at another level."""
    shape = sub.layers[layer]
    if isinstance(level, tuple):
        new = replace(shape, kv_heads=level[0], q_per_kv=level[1])
    else:
        new = replace(shape, mlp=level)
    return replace(sub, layers=(*sub.layers[:layer], new, *sub.layers[layer + 1 :]))


def error_of(errors: Errors, layer: int, level: AttentionLevel | int) -> float:
    """The reformed error of one level."""
    if isinstance(level, tuple):
        return float(errors.attention[layer, level[0], level[1]])
    return float(errors.mlp[layer, level])


def measure(
    objective: Divergence,
    whole: SubNetwork,
    space: SearchSpace,
    errors: Errors,
    windows: Sequence[int],
    *,
    points: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[Anchor]:
    """KL of the model with one sub-layer at one of `points` levels, everything else dense, for every sub-layer."""
    anchors = []
    for layer in range(len(whole.layers)):
        levels: list[AttentionLevel | int] = []
        levels += _spread(space.attention[layer][1:], points)
        levels += _spread(space.mlp[layer][1:], points)
        values = objective.measure([with_level(whole, layer, level) for level in levels], windows)
        for level, value in zip(levels, values, strict=True):
            which: Which = "attention" if isinstance(level, tuple) else "mlp"
            anchors.append(Anchor(layer, which, error_of(errors, layer, level), max(float(np.mean(value)), 0.0)))
        if advance:
            advance(1)
    return anchors


def _spread(levels: Sequence[T], points: int) -> list[T]:
    """A few levels, evenly between the gentlest and the hardest, neither of them if others will do."""
    n = len(levels)
    if n <= points:
        return list(levels)
    return [levels[round((k + 1) * (n - 1) / (points + 1))] for k in range(points)]


def curves(errors: Errors, anchors: Sequence[Anchor], layout: Layout, space: SearchSpace, hidden: int) -> list[Curve]:
    """The divergence and the cost of every level of every sub-layer, attention then MLP, layer by layer.

    A level's divergence is half its error (to second order, if the errors are weighted by the curvature), times a
    factor for its sub-layer that the measured levels give.
    """
    factor = factors(anchors)
    out = []
    for layer in range(len(space.attention)):
        for which in WHICH:
            levels = space.attention[layer] if which == "attention" else space.mlp[layer]
            scale = factor.get((layer, which), 1.0) / 2
            nats = tuple(scale * error_of(errors, layer, level) for level in levels)
            costs = tuple(float(_cost(layout, layer, level, hidden)) for level in levels)
            out.append(Curve(layer, which, levels, costs, nats))
    return out


def factors(anchors: Sequence[Anchor], noise: float = math.log(2)) -> dict[tuple[int, Which], float]:
    """By how much the measured levels of each sub-layer say that its errors underrate its divergence.

    The logarithm of measured over predicted divergence, averaged over a sub-layer's levels. What lies within `noise`
    (a short measurement) is believed by half, what exceeds it is believed: that mends the few sub-layers whose errors
    mislead, such as the first ones, and leaves the curvature's ranking of the others.
    """
    logs: dict[tuple[int, Which], list[float]] = {}
    for a in anchors:
        if a.error > TINY:
            logs.setdefault((a.layer, a.which), []).append(math.log(2 * max(a.nats, TINY) / a.error))
    found = {}
    for key, values in logs.items():
        ratio = float(np.mean(values))
        found[key] = math.exp(ratio - 0.5 * min(max(ratio, -noise), noise))
    return found


def believing(curves: Sequence[Curve], factor: Mapping[tuple[int, Which], float], belief: float) -> list[Curve]:
    """The same curves, with the measured levels' `factors` taken to a power: 1 as they are, 0 not at all.

    A level that is measured alone is right about gentle cuts and misleads about hard ones, where what counts is how
    the errors of many sub-layers add up.
    """
    return [
        replace(c, nats=tuple(nats * factor.get((c.layer, c.which), 1.0) ** (belief - 1) for nats in c.nats))
        for c in curves
    ]


def _cost(layout: Layout, layer: int, level: AttentionLevel | int, hidden: int) -> int:
    if isinstance(level, tuple):
        return sublayer_parameters(layout, layer, "attention", LayerShape(level[0], level[1], 0), hidden)
    return sublayer_parameters(layout, layer, "mlp", LayerShape(0, 0, level), hidden)


def subnetwork_of(curves: Sequence[Curve], levels: Sequence[int], hidden: int) -> SubNetwork:
    """The sub-network that takes the given level of every curve."""
    shapes: dict[int, LayerShape] = {}
    for curve, index in zip(curves, levels, strict=True):
        level = curve.levels[index]
        shape = shapes.get(curve.layer, LayerShape(0, 0, 0))
        if isinstance(level, tuple):
            shapes[curve.layer] = replace(shape, kv_heads=level[0], q_per_kv=level[1])
        else:
            shapes[curve.layer] = replace(shape, mlp=level)
    return SubNetwork(hidden, tuple(shapes[i] for i in sorted(shapes)))


def predict(curves: Sequence[Curve], sub: SubNetwork) -> float:
    """The sum of the curves at a sub-network's levels, nats; widths between two levels are interpolated linearly."""
    total = 0.0
    for curve in curves:
        shape = sub.layers[curve.layer]
        if curve.which == "attention":
            total += curve.nats[curve.levels.index((shape.kv_heads, shape.q_per_kv))]
        else:
            widths = np.array(curve.levels, dtype=float)
            order = widths.argsort()
            total += float(np.interp(shape.mlp, widths[order], np.array(curve.nats)[order]))
    return total
