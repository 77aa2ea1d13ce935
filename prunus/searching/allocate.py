"""Floor 1: which level for every sub-block, when errors and costs add up: a multiple-choice knapsack. numpy only.

Curves are lists over sub-blocks; `costs[m][l]` and `errors[m][l]` belong to level l of sub-block m. Any cost that is a
sum over sub-blocks will do: parameters, bytes, FLOPs, milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prunus.errors import UserError

Floats = NDArray[np.float64]
Levels = tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """One level for every sub-block, with the sums of its costs and of its weighted errors."""

    levels: Levels
    cost: float
    error: float


def allocate(
    costs: Sequence[ArrayLike],
    errors: Sequence[ArrayLike],
    budget: float,
    *,
    weights: Sequence[float] | None = None,
    buckets: int = 10_000,
) -> Allocation:
    """The levels of the least total error whose total cost is at most `budget`, by dynamic programming.

    costs, errors: per sub-block the cost and the error of each of its levels, in any order.
    weights: factors of the errors, one per sub-block (default 1).
    buckets: resolution of the budget. The answer is exact if costs and budget, counted from the cheapest levels, are
        multiples of a unit of at most `buckets` steps; otherwise costs are rounded to the nearest bucket inside the
        programme only: the true cost decides what is admissible, and what is left of the budget is spent by exchanges.
    Raises UserError where the cheapest levels already cost more than the budget.
    The recursion is SPDY's (Frantar & Alistarh 2022, arXiv:2201.13096):
    D[m, b] = min over l of D[m-1, b - c_m(l)] + a_m e_m(l).
    """
    c, e = _curves(costs, errors, weights)
    cheapest = sum(float(x.min()) for x in c)
    if cheapest > budget * (1 + 1e-12):
        dearest = sum(float(x.max()) for x in c)
        raise UserError(
            f"no allocation costs {budget:.6g} or less; the reachable costs are {cheapest:.6g} to {dearest:.6g}"
        )
    steps, capacity = _steps(c, budget - cheapest, buckets)
    best, paid, choice = _programme(c, e, steps, capacity)
    admissible = np.where(paid <= budget * (1 + 1e-12), best, np.inf)
    b = int(np.argmin(admissible))
    levels = []
    for m in range(len(c) - 1, -1, -1):
        level = int(choice[m, b])
        levels.append(level)
        b -= int(steps[m][level])
    return _polish(c, e, levels[::-1], budget)


def sweep(
    costs: Sequence[ArrayLike], errors: Sequence[ArrayLike], *, weights: Sequence[float] | None = None
) -> list[Allocation]:
    """Every allocation that some price of a unit of cost makes optimal, from the cheapest to the best (a whole front).

    These are the corners of the convex hull of all (cost, error) pairs; between two of them `allocate` is exact.
    """
    c, e = _curves(costs, errors, weights)
    hulls = [_hull(x, y) for x, y in zip(c, e, strict=True)]
    levels = [hull[0] for hull in hulls]
    moves = [
        ((e[m][b] - e[m][a]) / (c[m][b] - c[m][a]), m, b) for m, hull in enumerate(hulls) for a, b in pairwise(hull)
    ]
    found = [_total(c, e, levels)]
    for _, m, level in sorted(moves):
        levels[m] = level
        found.append(_total(c, e, levels))
    return found


def _curves(
    costs: Sequence[ArrayLike], errors: Sequence[ArrayLike], weights: Sequence[float] | None
) -> tuple[list[Floats], list[Floats]]:
    c = [np.asarray(x, dtype=np.float64) for x in costs]
    e = [np.asarray(x, dtype=np.float64) for x in errors]
    if weights is not None:
        e = [w * x for w, x in zip(weights, e, strict=True)]
    for m, (x, y) in enumerate(zip(c, e, strict=True)):
        if x.ndim != 1 or x.shape != y.shape or not x.size:
            raise ValueError(f"sub-block {m} has costs of shape {x.shape} and errors of shape {y.shape}")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(f"sub-block {m} has costs or errors that are not finite")
    return c, e


def _steps(c: list[Floats], spare: float, buckets: int) -> tuple[list[NDArray[np.int64]], int]:
    """Costs above the cheapest level in buckets, and the number of buckets that the programme needs."""
    above = [x - x.min() for x in c]
    most = sum(float(x.max()) for x in above)
    spare = min(spare, most)
    if spare <= 0:
        return [np.where(x > 0, 1, 0) for x in above], 0
    unit = spare / buckets
    if all(np.all(x == np.round(x)) and x.max() < 2**53 for x in above):
        common = math.gcd(*(int(v) for x in above for v in x))
        if common and spare / common <= buckets:
            return [np.round(x / common).astype(np.int64) for x in above], int(spare // common)
    # rounding errors of different signs cancel, so paths that are slightly over in buckets can be within the budget
    return [np.round(x / unit).astype(np.int64) for x in above], min(buckets, round(most / unit)) + 4 * len(c)


def _programme(
    c: list[Floats], e: list[Floats], steps: list[NDArray[np.int64]], capacity: int
) -> tuple[Floats, Floats, NDArray[np.int32]]:
    """Least error, its true cost, and the last level chosen, for every number of buckets spent exactly."""
    best = np.full(capacity + 1, np.inf)
    paid = np.full(capacity + 1, np.inf)
    best[0] = paid[0] = 0.0
    choice = np.full((len(c), capacity + 1), -1, dtype=np.int32)
    for m in range(len(c)):
        new, cost = np.full_like(best, np.inf), np.full_like(paid, np.inf)
        for level in range(len(c[m])):
            k = int(steps[m][level])
            if k > capacity:
                continue
            value = best[: capacity + 1 - k] + e[m][level]
            spent = paid[: capacity + 1 - k] + c[m][level]
            better = (value < new[k:]) | ((value == new[k:]) & (spent < cost[k:]))
            new[k:][better], cost[k:][better] = value[better], spent[better]
            choice[m, k:][better] = level
        best, paid = new, cost
    return best, paid, choice


def _polish(c: list[Floats], e: list[Floats], start: Sequence[int], budget: float) -> Allocation:
    """Spend what rounding left over: change one level while that lowers the error within the budget."""
    levels = list(start)
    spare = budget * (1 + 1e-12) - sum(float(x[k]) for x, k in zip(c, levels, strict=True))
    while True:
        gain, where, level = 0.0, -1, -1
        for m, k in enumerate(levels):
            drop = np.where(c[m] - c[m][k] <= spare, e[m][k] - e[m], -np.inf)
            j = int(np.argmax(drop))
            if drop[j] > gain:
                gain, where, level = float(drop[j]), m, j
        if where < 0:
            return _total(c, e, levels)
        spare -= float(c[where][level] - c[where][levels[where]])
        levels[where] = level


def _total(c: list[Floats], e: list[Floats], levels: Sequence[int]) -> Allocation:
    cost = sum(float(x[k]) for x, k in zip(c, levels, strict=True))
    return Allocation(tuple(levels), cost, sum(float(y[k]) for y, k in zip(e, levels, strict=True)))


def _hull(cost: Floats, error: Floats) -> list[int]:
    """Levels on the lower convex hull, from the cheapest to the best."""
    hull: list[int] = []
    for k in (int(k) for k in np.lexsort((error, cost))):
        if hull and error[k] >= error[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (error[b] - error[a]) * (cost[k] - cost[a]) < (error[k] - error[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


__all__ = ["Allocation", "allocate", "sweep"]
