"""Floor 1: what a prediction means, from cases where prediction and measurement are both known. Plain numbers.

Sums of error curves rank networks well, but their scale drifts: errors of many sub-layers do not simply add up, and the
last pass mends a part of them. A few networks that were measured give the scale, and how far to trust it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

TINY = 1e-12
Known = tuple[float, float]  # (predicted, measured) of one case


@dataclass(frozen=True)
class Forecast:
    """A measurement that was not made, and how far off such forecasts were where they could be checked.

    factor: 1.05 means that the known cases, each forecast from the others, were at most 5 % off, either way; None where
    there are too few of them to say, or where all of them lie on one side.
    """

    value: float
    factor: float | None


def forecast(known: Sequence[Known], predicted: float) -> Forecast:
    """What will be measured where `predicted` is predicted; both are positive, in any unit.

    Between two known cases log(measured) is linear in log(predicted); beyond the first and the last one the ratio of
    measured to predicted stays as it is there. Raises ValueError where nothing is known.
    """
    if not known:
        raise ValueError("a forecast needs at least one case where prediction and measurement are known")
    points = sorted((_log(x), _log(y)) for x, y in known)
    off = [
        abs(_read([p for p in points if p is not one], one[0]) - one[1])
        for one in points[1:-1]  # the ends have a neighbour on one side only, so a gap there says little
    ]
    inside = points[0][0] <= _log(predicted) <= points[-1][0]
    return Forecast(math.exp(_read(points, _log(predicted))), math.exp(max(off)) if off and inside else None)


def _log(x: float) -> float:
    return math.log(max(x, TINY))


def _read(points: Sequence[Known], x: float) -> float:
    """A piecewise linear curve at x, its ends continued with slope 1."""
    k = bisect_left([a for a, _ in points], x)
    if k == 0 or k == len(points):
        a, b = points[min(k, len(points) - 1)]
        return b + x - a
    (a, b), (c, d) = points[k - 1], points[k]
    return b + (d - b) * (x - a) / (c - a) if c > a else d


__all__ = ["Forecast", "Known", "forecast"]
