"""Floor 3: what a rival method is given and what it gives back, and the rules that all of them share."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunus.errors import UserError
from prunus.machine import Meter, reset_peak, resident_bytes
from prunus.models import costs
from prunus.models.families import Family, family_of, full
from prunus.models.stream import LayerStream
from prunus.progress import Progress, silent
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The finished network of a method."""

    model: nn.Module  # ready to be measured and saved; never the subject's own
    sub: SubNetwork  # its shape, counted in the dense model's units
    notes: tuple[str, ...] = ()  # what a reader of its figures must know


@dataclass(frozen=True)
class Spent:
    """What a computation took. A backward pass counts as two forwards.

    Peaks: of a method, with the dense model in them; of a statistic, above what was resident when it was begun.
    """

    seconds: float = 0.0
    forward_tokens: int = 0
    peak_bytes: int = 0
    peak_cuda_bytes: int = 0


Sizes = tuple[int, int]  # bytes in the memory of the process, and on a CUDA device


@dataclass(frozen=True)
class Known:
    """What was computed once, what that took, and what it holds."""

    value: Any
    spent: Spent
    held: Sizes


@dataclass
class Subject:
    """A dense model and calibration windows (n, length), for any number of methods and shares.

    What several of them need is computed once and remembered; `spent` charges it to each of them in full, as if it had
    been run alone. Methods leave the model as it is.
    """

    model: Any
    ids: Tensor
    seed: int = 0
    search_tokens: int = 100_000  # that a search may forward for one network
    generations: int = 5  # that an evolution divides them among
    window: int = 1024  # tokens in the windows that greedy methods and searches judge by
    gradient_windows: int = 10  # that gradients are taken from
    micro: int = 4  # windows that run together
    progress: Progress = silent
    family: Family = field(init=False)
    layout: costs.Layout = field(init=False)
    whole: SubNetwork = field(init=False)
    stream: LayerStream = field(init=False)
    _memo: dict[Hashable, Known] = field(default_factory=dict)
    _used: dict[Hashable, Known | None] = field(default_factory=dict)  # in the order of use; None: made by this run
    _meters: list[Meter] = field(default_factory=lambda: [Meter()])
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def __post_init__(self) -> None:
        self.family = family_of(self.model.config)
        self.layout = costs.layout(self.model, self.family)
        self.whole = full(self.model.config)
        self.stream = LayerStream(self.model, self.family)

    @property
    def device(self) -> torch.device:
        return self.stream.device

    @property
    def blocks(self) -> int:
        """Parameters in the decoder blocks of the dense model."""
        return costs.parameters(self.layout, self.whole)

    def budget(self, keep: float) -> int:
        """Parameters that the blocks of a network may have."""
        return int(keep * self.blocks + 1e-6)

    def judged(self) -> Tensor:
        """The calibration tokens in windows of at most `window`, as many as fit."""
        length = min(self.window, self.ids.shape[1])
        per_row = self.ids.shape[1] // length
        return self.ids[:, : per_row * length].reshape(-1, length)

    def copy(self) -> Any:
        """The dense model once more, to be changed."""
        return copy.deepcopy(self.model)

    def folder(self) -> Path:
        """A directory that lives as long as the subject."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="prunus-")
        return Path(self._folder.name)

    def count(self, tokens: float) -> None:
        """Add forward tokens to what is being computed."""
        self._meters[-1].forward_tokens += round(tokens)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of a computation that several methods or shares need; its cost is charged to each of them."""
        if key not in self._memo:
            found, spent = self._measured(compute)
            self._memo[key] = Known(found, spent, sizes(tensors_in(found)))
            self._used[key] = None
            self.count(spent.forward_tokens)
        known = self._memo[key]
        self._used.setdefault(key, known)
        value: T = known.value
        return value

    def run(self, compute: Callable[[], T]) -> tuple[T, Spent]:
        """A value and what it took, with what was remembered from earlier computations."""
        self._used = {}
        value, own = self._measured(compute)
        known = [one for one in self._used.values() if one is not None]
        dense = sizes((*self.model.parameters(), *self.model.buffers()))
        dense = (dense[0] if resident_bytes() else 0, dense[1])  # where the system does not say, it is in the peak
        host = charged(dense[0], own.peak_bytes, [(one.spent.peak_bytes, one.held[0]) for one in known])
        cuda = charged(dense[1], own.peak_cuda_bytes, [(one.spent.peak_cuda_bytes, one.held[1]) for one in known])
        seconds = own.seconds + sum(one.spent.seconds for one in known)
        return value, Spent(seconds, own.forward_tokens + sum(one.spent.forward_tokens for one in known), host, cuda)

    def _measured(self, compute: Callable[[], T]) -> tuple[T, Spent]:
        """A value and what it took; peaks above what was resident before. Measurements around it go on."""
        for outer in self._meters:
            outer.see()
        reset_peak()
        meter = Meter()
        self._meters.append(meter)
        try:
            value = compute()
        finally:
            for one in self._meters:
                one.see()
            self._meters.pop()
        return value, Spent(time.monotonic() - meter.start, meter.forward_tokens, *meter.grown())


def charged(dense: int, own: int, known: Sequence[tuple[int, int]]) -> int:
    """Peak memory of a method in bytes as if it had run alone: the dense model, and the most that came on top of it.

    own: peak of its computation above what was resident when that began. known: peak and size of every statistic that
    was there before, in the order of use: each is made beside those before it, and the method works beside all.
    """
    held, most = 0, 0
    for peak, size in known:
        most, held = max(most, held + peak), held + size
    return dense + max(most, held + own)


def sizes(tensors: Iterable[Tensor]) -> Sizes:
    """Bytes of the memory behind tensors, what several share once."""
    blocks = {(t.device.type, (s := t.untyped_storage()).data_ptr()): s.nbytes() for t in tensors}
    cuda = sum(n for (device, _), n in blocks.items() if device == "cuda")
    return sum(blocks.values()) - cuda, cuda


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in plain containers and dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for one in value.values() for t in tensors_in(one))
    elif isinstance(value, (list, tuple)):
        yield from (t for one in value for t in tensors_in(one))
    elif is_dataclass(value):
        yield from tensors_in(vars(value))


# ------------------------------------------------------------------------------------------------------------ widths


def members(subject: Subject, groups: Sequence[Tensor], neurons: Sequence[Tensor]) -> SubNetwork:
    """The sub-network that keeps the named KV groups and neurons of every layer (indices, in any order)."""
    per_group = subject.whole.layers[0].q_per_kv
    shapes, kept = [], []
    for g, n in zip(groups, neurons, strict=True):
        shapes.append(LayerShape(len(g), per_group if len(g) else 0, len(n)))
        kept.append(LayerKept(kv_heads=_ascending(g), mlp=_ascending(n)))
    return SubNetwork(subject.whole.hidden, tuple(shapes), tuple(kept))


def _ascending(index: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in index.sort().values)


def even_widths(subject: Subject, keep: float, layers: Sequence[int] | None = None) -> tuple[int, int]:
    """KV groups and neurons of every pruned layer, for methods that cut all layers alike; others stay whole.

    int((1 - share) groups) groups leave, as the released codes round heads, and the MLPs fill the budget up exactly.
    layers: those that are pruned (default: all), so that their share is smaller than `keep`.
    Raises UserError where the MLPs cannot give as much as is asked.
    """
    whole, n = subject.whole, len(subject.whole.layers)
    cut = set(range(n) if layers is None else layers)
    share = 1 - (1 - keep) * n / len(cut)
    most = whole.layers[0]
    groups = max(1, most.kv_heads - int((1 - share) * most.kv_heads + 1e-9))

    def cost(width: int) -> int:
        shape = LayerShape(groups, most.q_per_kv, width)
        shapes = (shape if i in cut else most for i in range(n))
        return costs.parameters(subject.layout, SubNetwork(whole.hidden, tuple(shapes)))

    fitting = largest(lambda width: cost(width) <= subject.budget(keep), most.mlp)
    if fitting is None:
        raise UserError(
            f"cannot keep {keep:g}: with {len(cut)} of {n} layers pruned and {groups} of {most.kv_heads} KV groups "
            "left in each, no MLP is small enough; keep more"
        )
    return groups, fitting


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number in 1..most that fits, where all smaller ones fit too; None if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low or None


def best(scores: Tensor, n: int) -> Tensor:
    """Indices of the n highest scores (n,); of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:n]


# ------------------------------------------------------------------------------------------------------------- depth


def droppable(subject: Subject) -> list[int]:
    """Layers that a network may lack: all but the first, whose attention caches take their sizes from."""
    return list(range(1, len(subject.whole.layers)))


def without(subject: Subject, layers: Sequence[int]) -> SubNetwork:
    """The network without whole layers."""
    gone = LayerShape(0, 0, 0)
    whole = subject.whole
    return SubNetwork(whole.hidden, tuple(gone if i in layers else s for i, s in enumerate(whole.layers)))


def leavers(subject: Subject, keep: float) -> int:
    """How many whole layers must leave (all have the same size); raises UserError where the first would."""
    n = len(subject.whole.layers)
    for gone in range(n):
        if costs.parameters(subject.layout, without(subject, range(n - gone, n))) <= subject.budget(keep):
            return gone
    raise UserError(f"cannot keep {keep:g} in whole layers: 1 of {n} always stays, which is {1 / n:.3g}; keep more")


FIRST_STAYS = "layer 0 is never dropped: caches take their sizes from its attention"
