"""Floor 1: how long a sub-network takes, from a table that was measured on one device. Pure data, no torch.

A layer with an attention of (kv_heads, q_per_kv) and an MLP of some width takes `attention + mlp - empty`: each part is
measured in a layer without the other, so the frame of a layer is in both, and `empty` is that frame alone. A layer that
lacks a part takes what the other one took; a layer that lacks both is not there. What lies outside the layers
(embedding, masks, head, choosing the token) is added once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prunus.errors import UserError
from prunus.recording.artefact import write_text
from prunus.subnetwork import LayerShape, SubNetwork

Phase = Literal["prefill", "decode"]
FORMAT = 1  # of a table in the cache; a change of how it is measured counts up
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is timed: a prompt for each sequence of a batch, then so many tokens for each."""

    prompt: int = 512
    batch: int = 2
    generate: int = 64

    def ms(self, prefill: float, decode: float) -> float:
        """The whole request, from its prompt and one decoding step."""
        return prefill + self.generate * decode


@dataclass(frozen=True)
class Grid:
    """The widths that are measured, each list ascending and ending with the full width."""

    kv_heads: tuple[int, ...]
    q_per_kv: tuple[int, ...]
    mlp: tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one forward, on the points of a grid."""

    outside: float
    empty: float  # a layer without either part
    attention: tuple[tuple[float, ...], ...]  # [kv_heads][q_per_kv], in a layer without MLP
    mlp: tuple[float, ...]  # in a layer without attention


def grid_of(size: Mapping[str, int], step: int | None = None, most: int = 24) -> Grid:
    """The grid of a model (its `dims`): MLP widths are multiples of `step`.

    step: by default the least multiple of 32 with at most `most` widths: vector registers, cores of a GPU and the
        blocks of quantised formats (32, 256) all make stairs at such multiples.
    """
    full = size["mlp"]
    step = step or 32 * max(1, -(-full // (32 * most)))
    if not 1 <= step <= full:
        raise UserError(f"a step of {step} neurons is outside 1..{full}, the MLP width of this model")
    widths = sorted({*range(step, full + 1, step), full})
    return Grid(_spread(size["kv_heads"], 8), _spread(size["q_per_kv"], 6), tuple(widths))


def _spread(full: int, most: int) -> tuple[int, ...]:
    """1 .. full, or so many of them, evenly."""
    if full <= most:
        return tuple(range(1, full + 1))
    return tuple(sorted({round(1 + k * (full - 1) / (most - 1)) for k in range(most)}))


@dataclass(frozen=True)
class Timetable:
    """Milliseconds of every sub-network of one super-network, on one device, for one request."""

    key: Mapping[str, Any]  # everything that the times depend on: device, runtime, dtype, threads, shapes, versions
    request: Request
    hidden: int
    grid: Grid
    prefill: Times
    decode: Times  # one step; the mean position of the request's steps
    spread: float  # half the distance of the quartiles of a whole forward's times, relative; unrest of the machine
    check: float  # relative error for a network that it was not made from (PyTorch: the dense one), the larger phase's

    @cached_property
    def _known(self) -> dict[tuple[Phase, LayerShape], float]:
        return {}  # a search asks for the same few hundred layers a million times

    def layer_ms(self, phase: Phase, shape: LayerShape) -> float:
        """One layer in one forward."""
        if (phase, shape) not in self._known:
            self._known[phase, shape] = self._layer_ms(phase, shape)
        return self._known[phase, shape]

    def _layer_ms(self, phase: Phase, shape: LayerShape) -> float:
        times = self.prefill if phase == "prefill" else self.decode
        if not shape.attends and not shape.mlp:
            return 0.0
        attention = _on_grid(self.grid.kv_heads, shape.kv_heads, self._by_heads(times, shape)) if shape.attends else 0.0
        mlp = _on_grid(self.grid.mlp, shape.mlp, times.mlp) if shape.mlp else 0.0
        if shape.attends and shape.mlp:
            return max(attention + mlp - times.empty, attention, mlp)
        return attention + mlp

    def _by_heads(self, times: Times, shape: LayerShape) -> list[float]:
        return [_on_grid(self.grid.q_per_kv, shape.q_per_kv, row) for row in times.attention]

    def ms(self, sub: SubNetwork, phase: Phase) -> float:
        """One forward: the prompt, or one decoding step."""
        if sub.hidden != self.hidden:
            raise ValueError(f"the table is for a hidden size of {self.hidden}, the sub-network has {sub.hidden}")
        outside = self.prefill.outside if phase == "prefill" else self.decode.outside
        return outside + sum(self.layer_ms(phase, shape) for shape in sub.layers)

    def request_ms(self, sub: SubNetwork) -> float:
        """The whole request."""
        return self.request.ms(self.ms(sub, "prefill"), self.ms(sub, "decode") if self.request.generate else 0.0)

    def tokens_per_second(self, sub: SubNetwork) -> float:
        """Tokens decoded in a second, all sequences together."""
        return 1000 * self.request.batch / self.ms(sub, "decode")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Timetable:
        raw: dict[str, Any] = json.loads(text)
        grid = Grid(**{name: tuple(widths) for name, widths in raw.pop("grid").items()})
        request, prefill, decode = Request(**raw.pop("request")), raw.pop("prefill"), raw.pop("decode")
        return cls(grid=grid, request=request, prefill=_times(prefill), decode=_times(decode), **raw)


def _times(raw: Mapping[str, Any]) -> Times:
    rows = tuple(tuple(row) for row in raw["attention"])
    return Times(raw["outside"], raw["empty"], rows, tuple(raw["mlp"]))


def _on_grid(points: Sequence[int], width: int, values: Sequence[float]) -> float:
    """Linear between two points, and below the first and above the last the line through the two nearest ones."""
    if len(points) == 1:
        return values[0]
    right = min(max(bisect_right(points, width), 1), len(points) - 1)
    (a, b), (x, y) = points[right - 1 : right + 1], values[right - 1 : right + 1]
    return max(x + (y - x) * (width - a) / (b - a), 0.0)


def rising(values: Sequence[float]) -> list[float]:
    """The nearest values that never fall (least squares): more work does not take less time, noise says so sometimes.

    Pool adjacent violators (Ayer et al. 1955).
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, n in pools for _ in range(n)]


def rising_table(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """The same along both axes of a table."""
    found = np.array(rows, dtype=np.float64)
    for _ in range(8):
        found = np.array([rising(row) for row in found])
        found = np.array([rising(column) for column in found.T]).T
    found = np.maximum.accumulate(np.maximum.accumulate(found, 0), 1)  # what alternating leaves
    return tuple(tuple(row) for row in found.tolist())


# ------------------------------------------------------------------------------------------------------------- cache


def cache_directory() -> Path:
    """Where tables are kept between runs: $PRUNUS_CACHE, else prunus/ in the user's cache directory."""
    if own := os.environ.get("PRUNUS_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "prunus"


def cached_path(key: Mapping[str, Any]) -> Path:
    """The file of the table with this key."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return cache_directory() / "latency" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def recall(key: Mapping[str, Any]) -> Timetable | None:
    """The table with this key from the cache; None where there is none, or none that can be read."""
    path = cached_path(key)
    try:
        found = Timetable.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the latency table %s cannot be read (%s): measuring again", path, error)
        return None
    return found if dict(found.key) == json.loads(json.dumps(dict(key))) else None


def remember(table: Timetable) -> Path | None:
    """Put a table into the cache, whole or not at all; a cache that cannot be written stops nothing."""
    path = cached_path(table.key)
    try:
        write_text(path, table.to_json())
    except (UserError, OSError) as error:
        log.warning("the latency table is not kept: %s", error)
        return None
    return path
