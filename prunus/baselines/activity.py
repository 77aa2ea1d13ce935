"""Floor 3: one pass of the calibration tokens through the dense model, and what several methods take from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.baselines.subject import Subject
from prunus.models.memory import give_back
from prunus.models.stream import LayerStream, inputs_of
from prunus.scoring.moments import add_products


@dataclass(frozen=True)
class Activity:
    """First and second moments of what the writers read, float64, by layer; and the ends of the windows."""

    mean: Mapping[str, Sequence[Tensor]]  # "attention" and "mlp": per layer (inputs of the writer,)
    square: Mapping[str, Sequence[Tensor]]  # mean of squares, the same shapes
    last: Tensor  # (layers + 1, windows, hidden): the residual stream at the last token, before every layer, and after

    def variance(self, which: str, layer: int) -> Tensor:
        """Variance of every input over all tokens, (inputs,)."""
        return (self.square[which][layer] - self.mean[which][layer] ** 2).clamp_min(0)


def activity(subject: Subject) -> Activity:
    """Collected once for a subject."""
    return subject.once("activity", lambda: _collect(subject))


@torch.no_grad()
def _collect(subject: Subject) -> Activity:
    stream, family = subject.stream, subject.family
    writers = {"attention": family.attention_writer, "mlp": family.mlp_writer}
    batches = list(torch.split(subject.ids, subject.micro))
    carried = [stream.embed(batch) for batch in batches]
    n, tokens = len(stream), subject.ids.numel()
    mean: dict[str, list[Tensor]] = {which: [] for which in writers}
    square: dict[str, list[Tensor]] = {which: [] for which in writers}
    last = [torch.cat([hidden[:, -1] for hidden in carried])]
    with subject.progress("activations of the dense model", n * tokens) as advance:
        for i, layer in enumerate(stream.layers):
            sums: dict[str, list[Tensor]] = {which: [] for which in writers}
            for b, batch in enumerate(batches):
                with inputs_of(layer, *writers.values()) as seen:
                    carried[b] = stream.run(i, carried[b])
                for which, path in writers.items():
                    x = seen[path].flatten(0, -2).double()
                    sums[which].append(torch.stack([x.sum(0), (x * x).sum(0)]))
                advance(batch.numel())
            for which, parts in sums.items():
                first, second = torch.stack(parts).sum(0) / tokens
                mean[which].append(first)
                square[which].append(second)
            last.append(torch.cat([hidden[:, -1] for hidden in carried]))
    subject.count(tokens)
    return Activity(mean, square, torch.stack(last).float())


class Moments:
    """Sums over the tokens that one module reads: squares of each input, or the whole Gram matrix, float32 or more."""

    def __init__(self, gram: bool) -> None:
        self.whole, self.n = gram, 0
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in x (tokens, inputs)."""
        if self.total is None:
            n = x.shape[1]
            shape, dtype = ((n, n), torch.float32) if self.whole else ((n,), torch.float64)
            self.total = torch.zeros(shape, dtype=dtype, device=x.device)
        if self.whole:
            add_products(self.total, x, x)
        else:
            self.total += x.float().pow(2).sum(0, dtype=torch.float64)
        self.n += x.shape[0]

    def mean(self) -> Tensor:
        """The moments for one token."""
        assert self.total is not None
        return self.total / self.n


Edit = Callable[[int, nn.Module, Mapping[str, Tensor]], None]


@torch.no_grad()
def walk(subject: Subject, paths: Sequence[str], edit: Edit, *, gram: bool = False) -> Any:
    """A copy of the model, changed layer by layer, each judged on what the changed layers before it produce.

    paths: modules of a layer whose inputs are watched; those that read the same tensor share one sum.
    edit(i, layer, moments by path): changes layer i **in place**, as Wanda and SparseGPT do.
    """
    model = subject.copy()
    stream = LayerStream(model, subject.family)
    batches = list(torch.split(subject.ids, subject.micro))
    carried = [stream.embed(batch) for batch in batches]
    n, tokens = len(stream), subject.ids.numel()
    with subject.progress("layer by layer", 2 * n * tokens) as advance:
        for i, layer in enumerate(stream.layers):
            own = [path for path in paths if _has(layer, path)]
            shared: dict[str, Moments] = {}
            for hidden in carried:
                with inputs_of(layer, *own) as seen:
                    stream.run(i, hidden)
                by_tensor: dict[int, str] = {}
                for path in own:
                    owner = by_tensor.setdefault(seen[path].data_ptr(), path)
                    shared.setdefault(path, shared.get(owner) or Moments(gram))
                    if owner == path:
                        shared[path].add(seen[path].flatten(0, -2))
                advance(hidden.shape[0] * hidden.shape[1])
            means = {id(one): one.mean() for one in shared.values()}
            edit(i, layer, {path: means[id(one)] for path, one in shared.items()})
            for b, hidden in enumerate(carried):
                carried[b] = stream.run(i, hidden)
                advance(hidden.shape[0] * hidden.shape[1])
            give_back()
    subject.count(2 * tokens)
    return model


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True
