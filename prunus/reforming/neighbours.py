"""Floor 3: weights for a network that stands between refitted ones: what refitting changed in them, carried over.

The sequential pass spends minutes on a network of the front. What it changes in a matrix hardly depends on a few
neurons more or less in the layers around it. So a network between two of them takes the mean of their changes, in
proportion to how near each is, and its writers are reformed around that in closed form: no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.models.families import Family, dims, full, is_dropped
from prunus.models.rows import Row, layers_of, rows
from prunus.models.slicing import Override, kept_dims, take
from prunus.reforming.levels import Levels
from prunus.scoring.moments import writer_weight
from prunus.subnetwork import LayerShape, SubNetwork

Place = slice | Tensor
SHARE = 0.65  # of their change that pays in a network between them; the rest fits them alone (docs/lab-first-days.md)


@dataclass(frozen=True)
class Neighbour:
    """A network of the same sorted super-network, the weights that it ended with, and its say (any positive number)."""

    sub: SubNetwork
    weights: Override
    say: float


@torch.no_grad()
def inherit(
    model: nn.Module,
    family: Family,
    database: Levels,
    sub: SubNetwork,
    neighbours: Sequence[Neighbour],
    share: float = SHARE,
) -> dict[tuple[int, str], Tensor]:
    """Weights of `sub`, in storage order: one-shot ones, moved by a share of what refitting changed in its neighbours.

    A neighbour without weights (the super-network itself, say) stands for no change. Entries that no neighbour has are
    not moved. The model must be sorted, hidden sizes are the model's, and `sub` keeps the first units.
    """
    whole, writers = dims(model.config), {family.attention_writer: "attention", family.mlp_writer: "mlp"}
    dense, layers = full(model.config), layers_of(model, family)
    found: dict[tuple[int, str], Tensor] = {}
    at, before = -1, list[Override]()
    for row in rows(model, family):
        i = row.layer
        if i is None or is_dropped(row.part, sub.layers[i]):
            continue
        if i != at:  # layer by layer, while its Grams are at hand
            at, before = i, [database.of_layer(n.sub, i) for n in neighbours]
        inside, shape = row.path.removeprefix(f"{family.layers}.{i}."), sub.layers[i]
        change = _change(row, (i, inside), whole, neighbours, before)
        path, _, name = inside.rpartition(".")
        if path in writers and name == "weight":
            if change is not None or _inner(shape, writers[path]) != _inner(dense.layers[i], writers[path]):
                moved = writer_weight(layers[i], path).float()
                moved = moved if change is None else moved + share * _as_matrix(row, change)
                found |= database.reformed(i, writers[path], shape, moved)
        elif change is not None:
            kept = kept_dims(whole, sub.hidden, shape, None)
            start = found.get((i, inside), take(row.parameter.data, row.axes, whole, kept))
            new = start.float() + share * take(change, row.axes, whole, kept)
            found[i, inside] = new.to(row.parameter.dtype).contiguous()
    return found


def _inner(shape: LayerShape, which: str) -> tuple[int, ...]:
    return (shape.kv_heads, shape.q_per_kv) if which == "attention" else (shape.mlp,)


def _change(
    row: Row,
    key: tuple[int, str],
    whole: Mapping[str, int],
    neighbours: Sequence[Neighbour],
    before: Sequence[Override],
) -> Tensor | None:
    """Mean change of one parameter, in the super-network's shape, float32; None if no neighbour changed it."""
    if not any(key in n.weights for n in neighbours):
        return None
    i = key[0]
    total = torch.zeros(row.parameter.shape, device=row.parameter.device)
    says = torch.zeros_like(total)
    for n, old in zip(neighbours, before, strict=True):
        if is_dropped(row.part, n.sub.layers[i]):
            continue
        kept = kept_dims(whole, n.sub.hidden, n.sub.layers[i], n.sub.kept[i] if n.sub.kept else None)
        at = _places(row, whole, kept)
        says[at] += n.say
        if key in n.weights:
            was = old.get(key, take(row.parameter.data, row.axes, whole, kept))
            total[at] += n.say * (n.weights[key].float() - was.float())
    return total / says.clamp(min=torch.finfo(says.dtype).tiny)


def _places(row: Row, whole: Mapping[str, int], kept: Mapping[str, int | Tensor]) -> tuple[Place, ...]:
    """Where the entries of a cut parameter are in the whole one: an index for each axis; at most one is a tensor."""
    found: list[Place] = []
    for axis, n in zip(row.axes, row.parameter.shape, strict=True):
        index = take(torch.arange(n), (axis,), whole, kept)
        prefix = bool((index == torch.arange(len(index))).all())
        found.append(slice(0, len(index)) if prefix else index.to(row.parameter.device))
    assert sum(isinstance(place, Tensor) for place in found) < 2, row.path
    return tuple(found)


def _as_matrix(row: Row, change: Tensor) -> Tensor:
    return change if isinstance(row.module, nn.Linear) else change.T


__all__ = ["Neighbour", "inherit"]
