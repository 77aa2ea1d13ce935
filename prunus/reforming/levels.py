"""Floor 3: every nested level of every sub-layer: how much error it makes, and the weights it would be shipped with.

Built once per model from one pass over the calibration tokens; after that any candidate is linear algebra. The Grams
stay on disk, one file per layer, and are read when a level is first asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunus.models.families import Family, dims
from prunus.models.slicing import Override, layers_of
from prunus.reforming.reform import admm, closed_form, error_curve, greedy_group_order, greedy_order, reformed_error
from prunus.scoring.moments import Grams, stored, writer_weight
from prunus.subnetwork import LayerShape, SubNetwork

Orders = dict[str, Tensor]  # as slicing.sort takes them, one layer's entries


@dataclass(frozen=True)
class Errors:
    """Reformed error of every level; the unit is nats if Fisher weighted, else squared output.

    attention: (layers, groups + 1, heads per group + 1), entry [l, g, r] with g groups of r heads kept; a zero in
    either place means no attention. mlp: (layers, neurons + 1), entry [l, k] with the first k neurons kept.
    """

    attention: Tensor
    mlp: Tensor

    def save(self, path: Path) -> None:
        save_file({"attention": self.attention, "mlp": self.mlp}, path)

    @classmethod
    def load(cls, path: Path) -> Errors:
        raw = load_file(path)
        return cls(raw["attention"], raw["mlp"])


def head_columns(d: dict[str, int], kv_heads: Tensor, q_per_kv: Tensor) -> Tensor:
    """Input columns of the attention's writer that the given groups and head slots own, in storage order."""
    return _columns(d)[kv_heads][:, q_per_kv].flatten()


def _columns(d: dict[str, int]) -> Tensor:
    """Numbers of the attention writer's inputs, (groups, heads per group, head_dim)."""
    shape = d["kv_heads"], d["q_per_kv"], d["head_dim"]
    return torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape)


def order_layer(grams: Grams, attention: Tensor, mlp: Tensor, d: dict[str, int], damping: float, block: int) -> Orders:
    """Greedy group-OBS orders of one layer: heads inside their groups, groups, neurons.

    attention, mlp: the writers' weights (out, in), Fisher weighted or not.
    """
    groups, heads, columns = d["kv_heads"], d["q_per_kv"], _columns(d)
    inside = torch.arange(heads).expand(groups, heads)
    if heads > 1:
        ranking = greedy_group_order(attention, grams.attention, list(columns.flatten(0, 1)), damping).tolist()
        inside = torch.tensor([[h % heads for h in ranking if h // heads == g] for g in range(groups)])
    outer = greedy_group_order(attention, grams.attention, list(columns.flatten(1)), damping)
    neurons = greedy_order(mlp, grams.mlp, damping, block).cpu()
    return {"q_per_kv": inside, "kv_heads": outer, "mlp": neurons}


def unsorted(model: Any) -> Orders:
    """Orders of all layers of a model that is sorted already: (layers, ...) each, everything where it is."""
    d, n = dims(model.config), int(model.config.num_hidden_layers)
    return {
        "kv_heads": torch.arange(d["kv_heads"]).repeat(n, 1),
        "q_per_kv": torch.arange(d["q_per_kv"]).repeat(n, d["kv_heads"], 1),
        "mlp": torch.arange(d["mlp"]).repeat(n, 1),
    }


def permute_grams(grams: Grams, orders: Orders, d: dict[str, int]) -> Grams:
    """The Grams as they are after `slicing.sort` with these orders."""
    heads, groups = orders["q_per_kv"].cpu(), orders["kv_heads"].cpu()  # row numbers are worked out on the CPU
    columns = torch.stack([g[h] for g, h in zip(_columns(d), heads, strict=True)])[groups]
    a, m = columns.flatten().to(grams.attention.device), orders["mlp"].to(grams.mlp.device)
    attention, mlp = grams.attention[a][:, a].contiguous(), grams.mlp[m][:, m].contiguous()
    return Grams(attention, mlp, grams.attention_mean[a], grams.mlp_mean[m])


def layer_errors(
    grams: Grams, attention: Tensor, mlp: Tensor, d: dict[str, int], damping: float
) -> tuple[Tensor, Tensor]:
    """One layer's rows of `Errors`, for weights and Grams in the sorted order."""
    grid = torch.zeros(d["kv_heads"] + 1, d["q_per_kv"] + 1)
    nothing = reformed_error(attention, grams.attention, torch.arange(0), damping)
    grid[0, :], grid[:, 0] = nothing, nothing
    for g in range(1, d["kv_heads"] + 1):
        for r in range(1, d["q_per_kv"] + 1):
            kept = head_columns(d, torch.arange(g), torch.arange(r))
            grid[g, r] = reformed_error(attention, grams.attention, kept, damping)
    grid[-1, -1] = 0
    return grid, error_curve(mlp, grams.mlp, damping).float().cpu()


def save_grams(grams: Grams, folder: Path, i: int) -> None:
    """Write one layer's Grams: `layer_007.safetensors`."""
    save_file({name: t.cpu() for name, t in vars(grams).items()}, folder / f"layer_{i:03d}.safetensors")


def read_grams(folder: Path, i: int, device: torch.device) -> Grams:
    """One layer's Grams from disk."""
    raw = load_file(folder / f"layer_{i:03d}.safetensors")
    return Grams(**{name: t.to(device) for name, t in raw.items()})


class Levels:
    """The reformed weights of a candidate, computed when first asked for, from Grams on disk.

    The model must be sorted by `orders`; the Grams are as `moments.collect` found them, before sorting.
    `Levels(...)` is a `Weights` callable for `objective.Divergence`. method: "closed-form", "admm" (Shen et al. 2024)
    or "none".
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        folder: Path,
        *,
        orders: Mapping[str, Tensor],
        damping: float = 1e-2,
        method: str = "closed-form",
        iterations: int = 30,
        cache_bytes: int = 512 << 20,
    ) -> None:
        self.layers, self.family, self.folder = layers_of(model, family), family, folder
        self.damping, self.method, self.iterations = damping, method, iterations
        self.orders = orders
        self.d = dims(model.config)
        self.whole = LayerShape(self.d["kv_heads"], self.d["q_per_kv"], self.d["mlp"])
        self._cache: OrderedDict[tuple[object, ...], dict[tuple[int, str], Tensor]] = OrderedDict()
        self._room = cache_bytes
        self._last: tuple[int, Grams] | None = None

    def grams(self, i: int) -> Grams:
        """One layer's Gram matrices from disk, in the sorted order, on the model's device; the last ones are kept."""
        if self._last is None or self._last[0] != i:
            own = read_grams(self.folder, i, next(self.layers[i].parameters()).device)
            self._last = i, permute_grams(own, {unit: order[i] for unit, order in self.orders.items()}, self.d)
        return self._last[1]

    def __call__(self, sub: SubNetwork) -> Override:
        return {key: new for i in range(len(sub.layers)) for key, new in self.of_layer(sub, i).items()}

    def of_layer(self, sub: SubNetwork, i: int) -> dict[tuple[int, str], Tensor]:
        """The writers of one layer; none, where hidden channels went or nothing is reformed."""
        found, shape, kept = dict[tuple[int, str], Tensor](), sub.layers[i], sub.kept[i] if sub.kept else None
        if sub.hidden != self.d["hidden"] or self.method == "none":
            return found
        heads = (
            tuple((kept and kept.kv_heads) or range(shape.kv_heads)),
            tuple((kept and kept.q_per_kv) or range(shape.q_per_kv)),
        )
        neurons = (kept and kept.mlp) or shape.mlp
        if shape.attends and (len(heads[0]), len(heads[1])) != (self.whole.kv_heads, self.whole.q_per_kv):
            found |= self._reformed(i, "attention", heads)
        if shape.mlp and shape.mlp != self.whole.mlp:
            found |= self._reformed(i, "mlp", neurons)
        return found

    def forget(self) -> None:
        """Give the memory of all cached levels back."""
        self._room += sum(t.nbytes for entry in self._cache.values() for t in entry.values())
        self._cache.clear()
        self._last = None

    def _reformed(self, i: int, which: str, kept: object) -> dict[tuple[int, str], Tensor]:
        key = (i, which, kept)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        path = self.family.attention_writer if which == "attention" else self.family.mlp_writer
        out = self._solved(i, which, kept, writer_weight(self.layers[i], path))
        self._cache[key] = out
        self._room -= sum(t.nbytes for t in out.values())
        while self._room < 0 and len(self._cache) > 1:
            self._room += sum(t.nbytes for t in self._cache.popitem(last=False)[1].values())
        return out

    def reformed(self, i: int, which: str, shape: LayerShape, weight: Tensor) -> dict[tuple[int, str], Tensor]:
        """Another full weight (out, in) for one writer of layer i, reformed for the first units that a shape keeps."""
        return self._solved(i, which, _first(which, shape), weight)

    def inputs(self, which: str, shape: LayerShape) -> Tensor:
        """Indices of the writer's inputs that a shape keeps, its first units."""
        return self._inputs(which, _first(which, shape))

    def _solved(self, i: int, which: str, kept: object, weight: Tensor) -> dict[tuple[int, str], Tensor]:
        path = self.family.attention_writer if which == "attention" else self.family.mlp_writer
        index, grams = self._inputs(which, kept), self.grams(i)
        gram, mean = getattr(grams, which), getattr(grams, f"{which}_mean")
        if len(index) == len(gram) or self.method == "none":
            new = weight[:, index.to(weight.device)]
        elif self.method == "admm":
            new = admm(weight, gram, index, iterations=self.iterations)
        else:
            new = closed_form(weight, gram, index, self.damping)
        out = {(i, f"{path}.weight"): stored(self.layers[i], path, new)}
        bias = self.layers[i].get_submodule(path).bias
        if isinstance(bias, Tensor):  # takes over the mean of what went, and of what the weights changed
            moved = weight.float() @ mean - new.float() @ mean[index.to(mean.device)]
            out[i, f"{path}.bias"] = (bias.detach().float() + moved).to(bias.dtype)
        return out

    def _inputs(self, which: str, kept: Any) -> Tensor:
        if which == "mlp":
            return torch.arange(kept) if isinstance(kept, int) else torch.tensor(kept)
        return head_columns(self.d, torch.tensor(kept[0]), torch.tensor(kept[1]))


def _first(which: str, shape: LayerShape) -> object:
    return shape.mlp if which == "mlp" else (tuple(range(shape.kv_heads)), tuple(range(shape.q_per_kv)))
