"""Floor 3: a table for `timetable.py` from the times of whole networks, where a program does not time single layers.

All layers of a timed network are alike, but for one network that lacks attentions and one that is only half as deep. A
network takes

    outside + sum over layers of [ a + b kv_heads + c kv_heads q_per_kv + M(mlp) ],

where M is linear between a handful of widths; the unknowns are the non-negative least-squares solution for relative
errors. A further network, with other widths, is left out of the fit and checks it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunus.errors import UserError
from prunus.models.families import Family, full
from prunus.models.slicing import layers_of
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.timing.latency import Lap, Laps, unrest
from prunus.timing.timetable import Grid, Phase, Request, Times, Timetable, rising, rising_table

KNOTS = 6  # widths of the MLP that are timed; lines in between
EMPTY = LayerShape(0, 0, 0)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Plan:
    """What is timed, and what the fit may tell apart."""

    networks: tuple[SubNetwork, ...]  # the dense one first; the last one is not fitted
    knots: tuple[int, ...]
    attention_alone: bool  # some network lacks attentions, so that they can be told from the MLPs
    attention_free: bool  # a layer without attention has none in the program either, and not one head of zeros
    stub: int  # neurons that stand where an MLP was


def plan_of(
    model: Any, family: Family, grid: Grid, runs: Callable[[SubNetwork], bool], *, attention_free: bool, stub: int
) -> Plan:
    """Networks whose times tell what every width takes, and one more that checks the answer.

    runs: whether the program can run a network; those that it cannot are left out.
    Raises UserError for a model of one layer.
    """
    whole, n = full(model.config), len(layers_of(model, family))
    if n < 2:
        raise UserError("a table of latencies needs a model of two layers or more; this one has one")
    dense = whole.layers[0]
    knots = _few(grid.mlp, KNOTS)
    middle = knots[len(knots) // 2]
    kv, q = dense.kv_heads, dense.q_per_kv
    heads = dict.fromkeys([(kv, 1), (1, q), (1, 1), ((kv + 1) // 2, q), ((kv + 1) // 2, (q + 1) // 2)])
    shapes: list[tuple[LayerShape, ...]] = [(dense,) * n, (dense,) * (n // 2) + (EMPTY,) * (n - n // 2)]
    shapes += [(LayerShape(kv, q, width),) * n for width in knots[:-1]]
    shapes += [(LayerShape(*own, middle),) * n for own in heads if own != (kv, q)]
    free = (dense, *(LayerShape(0, 0, dense.mlp),) * (n - 1))
    rng = random.Random(0)
    mixed = tuple(
        LayerShape(rng.choice(grid.kv_heads), rng.choice(grid.q_per_kv), rng.choice(grid.mlp)) for _ in range(n)
    )
    below = knots[-2] if len(knots) > 1 else knots[-1]
    between = (LayerShape(kv, q, (knots[-1] + below) // 2 // 32 * 32 or knots[-1]),) * (n - 1)
    possible = [SubNetwork(whole.hidden, own) for own in (*shapes, free)]
    networks = [sub for sub in possible if runs(sub)]
    left_out = next(
        sub for sub in (SubNetwork(whole.hidden, mixed), SubNetwork(whole.hidden, (*between, EMPTY))) if runs(sub)
    )
    alone = attention_free and possible[-1] in networks
    return Plan((*networks, left_out), knots, alone, attention_free, stub)


def _few(widths: Sequence[int], n: int) -> tuple[int, ...]:
    """At most n of some ascending numbers, the ends among them."""
    if len(widths) <= n:
        return tuple(widths)
    return tuple(sorted({widths[round(k * (len(widths) - 1) / (n - 1))] for k in range(n)}))


def laps_of(prefill: Array, decode: Array) -> list[Laps]:
    """Times (rounds, networks) of whole forwards, by network."""
    return [Laps([Lap(ms) for ms in a], [Lap(ms) for ms in b]) for a, b in zip(prefill.T, decode.T, strict=True)]


def features(sub: SubNetwork, planned: Plan) -> Array:
    """What the time of a network is linear in: 1, layers that attend, KV heads, heads, and the knots of its MLPs."""
    row = np.zeros(4 + len(planned.knots))
    row[0] = 1
    for i in sub.alive:
        shape = sub.layers[i]
        kv, q = (shape.kv_heads, shape.q_per_kv) if shape.attends else (0, 0)
        if not kv and not planned.attention_free:
            kv = q = 1
        row[1:4] += (kv > 0, kv, kv * q)
        width = shape.mlp or planned.stub
        if width:
            row[4:] += _hats(planned.knots, width)
    if not planned.attention_alone:
        row[1] = 0  # a constant of each layer: the knots have it
    return row


def _hats(knots: Sequence[int], width: int) -> Array:
    """Weights of the knots in the line through the two nearest ones."""
    out = np.zeros(len(knots))
    if len(knots) == 1:
        out[0] = 1
        return out
    right = int(np.clip(np.searchsorted(knots, width), 1, len(knots) - 1))
    share = (width - knots[right - 1]) / (knots[right] - knots[right - 1])
    out[right - 1], out[right] = 1 - share, share
    return out


def solve(rows: Array, ms: Array) -> Array:
    """Non-negative unknowns with the least squares of relative errors: what comes out negative is left out in turn."""
    scaled, ones = rows / ms[:, None], np.ones(len(ms))
    used = [int(k) for k in np.flatnonzero(np.abs(rows).sum(0))]
    while True:
        found = np.zeros(rows.shape[1])
        found[used] = np.linalg.lstsq(scaled[:, used], ones, rcond=None)[0]
        if found.min() >= -1e-12:
            return np.maximum(found, 0.0)
        used.remove(int(found.argmin()))


def fitted(
    key: dict[str, Any], request: Request, grid: Grid, planned: Plan, prefill: Array, decode: Array
) -> Timetable:
    """The table from the times (rounds, networks) of both phases, the last network being left out."""
    rows = np.array([features(sub, planned) for sub in planned.networks])
    times: dict[Phase, Times] = {}
    errors, restless = [], []
    phases: tuple[tuple[Phase, Array], ...] = (("prefill", prefill), ("decode", decode))
    for phase, found in phases:
        ms = np.median(found, 0)
        unknowns = solve(rows[:-1], ms[:-1])
        times[phase] = _times(unknowns, grid, planned)
        errors.append(abs(float(rows[-1] @ unknowns) / float(ms[-1]) - 1))
        restless += [unrest(column.tolist()) for column in found.T]
    whole = planned.networks[0]
    spread = statistics.median(restless)
    return Timetable(key, request, whole.hidden, grid, times["prefill"], times["decode"], spread, max(errors))


def _times(unknowns: Array, grid: Grid, planned: Plan) -> Times:
    outside, each, per_group, per_head, *at_knots = unknowns.tolist()

    def attention(kv: int, q: int) -> float:
        return float(each + per_group * kv + per_head * kv * q)

    def mlp(width: int) -> float:
        return max(0.0, float(_hats(planned.knots, width) @ np.array(at_knots)))

    without = 0.0 if planned.attention_free else attention(1, 1)  # what stands where an attention was
    stub = mlp(planned.stub) if planned.stub else 0.0
    heads = [[attention(kv, q) + stub for q in grid.q_per_kv] for kv in grid.kv_heads]
    widths = rising([mlp(width) + without for width in grid.mlp])
    return Times(float(outside), stub + without, rising_table(heads), tuple(widths))
