"""Floor 1: what may be searched: the widths that every layer may take. Pure data, no torch.

A space is a list of genes (attention of layer 0, MLP of layer 0, ..., hidden size), each with its options, largest
first. A choice of one option for each gene, written as a tuple of indices called levels, is a sub-network. All points
are legal: there is nothing to repair.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from prunus.errors import UserError
from prunus.models.families import dims
from prunus.subnetwork import LayerShape, SubNetwork

Heads = tuple[int, int]  # (KV groups, query heads in each); (0, 0) drops the attention
Levels = tuple[int, ...]  # one option's index for every gene
Cost = Callable[[SubNetwork], float]  # parameters, bytes, FLOPs, milliseconds: whatever a budget is written in
AttentionUnit = Literal["grid", "groups", "whole", "none"]


@dataclass(frozen=True)
class Gene:
    """One decision: a name and what can be chosen, largest first."""

    name: str  # "L03.attention", "L03.mlp", "hidden"; in uniform spaces "attention", "mlp", "layers", "hidden"
    options: tuple[Any, ...]  # (kv_heads, q_per_kv) pairs for attention, whole numbers for everything else


@dataclass(frozen=True)
class SearchSpace:
    """The widths that every layer may take, and the hidden sizes; each list has its largest option first."""

    attention: tuple[tuple[Heads, ...], ...]  # per layer; (0, 0) drops it, never in layer 0
    mlp: tuple[tuple[int, ...], ...]  # per layer; 0 drops it
    hidden: tuple[int, ...]
    uniform: bool = False  # all layers that are left are alike: what a stock config.json can describe
    depths: tuple[int, ...] = ()  # uniform only: how many layers may be left
    layer_order: tuple[int, ...] = ()  # uniform only: layers, most important first; the last ones are dropped

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.mlp) or not self.mlp or not self.hidden:
            raise ValueError("a space needs attention and MLP options for the same layers, and a hidden size")
        if (0, 0) in self.attention[0]:
            raise ValueError("the attention of layer 0 is never dropped")
        if self.uniform:
            if sorted(self.layer_order) != list(range(self.n_layers)) or self.layer_order[0] != 0 or not self.depths:
                raise ValueError("a uniform space needs depths, and an order of all layers that starts with layer 0")
            if len(set(self.attention)) > 1 or len(set(self.mlp)) > 1 or 0 in self.mlp[0]:
                raise ValueError("all layers of a uniform space have the same options, and none drops a sub-layer")
        for gene in self.genes:
            if not gene.options or len(set(gene.options)) != len(gene.options):
                raise ValueError(f"the options of {gene.name} are empty or repeat: {gene.options}")

    @property
    def n_layers(self) -> int:
        return len(self.mlp)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """Every decision; in per-layer spaces attention and MLP of layer 0, of layer 1, ..., then the hidden size."""
        if self.uniform:
            return (
                Gene("attention", self.attention[0]),
                Gene("mlp", self.mlp[0]),
                Gene("layers", self.depths),
                Gene("hidden", self.hidden),
            )
        digits = max(2, len(str(self.n_layers - 1)))
        layers = [
            Gene(f"L{i:0{digits}}.{part}", options)
            for i in range(self.n_layers)
            for part, options in (("attention", self.attention[i]), ("mlp", self.mlp[i]))
        ]
        return (*layers, Gene("hidden", self.hidden))

    def build(self, levels: Sequence[int]) -> SubNetwork:
        """The sub-network that chooses option `levels[g]` of every gene g."""
        chosen = [gene.options[level] for gene, level in zip(self.genes, levels, strict=True)]
        hidden = chosen.pop()
        if self.uniform:
            (kv_heads, q_per_kv), mlp, depth = chosen
            alive = set(self.layer_order[:depth])
            shape, gone = LayerShape(kv_heads, q_per_kv, mlp), LayerShape(0, 0, 0)
            return SubNetwork(hidden, tuple(shape if i in alive else gone for i in range(self.n_layers)))
        pairs = zip(chosen[::2], chosen[1::2], strict=True)
        return SubNetwork(hidden, tuple(LayerShape(kv, q, mlp) for (kv, q), mlp in pairs))

    def levels(self, sub: SubNetwork) -> Levels:
        """The inverse of `build`; raises ValueError where a width is not an option. Which members are kept is free."""
        return tuple(
            gene.options.index(value) for gene, value in zip(self.genes, self._values(sub, snap=False), strict=True)
        )

    def snap(self, sub: SubNetwork) -> Levels:
        """The levels nearest to a sub-network of another space; members that it names are forgotten."""
        return tuple(
            min(range(len(gene.options)), key=lambda k, o=gene.options, v=value: _distance(o[k], v))  # type: ignore[misc]
            for gene, value in zip(self.genes, self._values(sub, snap=True), strict=True)
        )

    def _values(self, sub: SubNetwork, snap: bool) -> list[Any]:
        if len(sub.layers) != self.n_layers:
            raise ValueError(f"the sub-network has {len(sub.layers)} layers, the space has {self.n_layers}")
        if not self.uniform:
            values: list[Any] = []
            for s in sub.layers:
                values += [(s.kv_heads, s.q_per_kv) if s.attends else (0, 0), s.mlp]
            return [*values, sub.hidden]
        alive = [sub.layers[i] for i in sub.alive]
        if not snap and (not sub.uniform or set(sub.alive) != set(self.layer_order[: len(alive)])):
            raise ValueError("layers differ, or are not the most important ones, but the space is uniform")
        if not alive:
            raise ValueError("no layer is left")
        middle = sorted(alive, key=lambda s: (s.mlp, s.kv_heads * s.q_per_kv, s.kv_heads))[len(alive) // 2]
        return [(middle.kv_heads, middle.q_per_kv), middle.mlp, len(alive), sub.hidden]

    def contains(self, sub: SubNetwork) -> bool:
        """True if every width is an option; which members are kept does not matter."""
        try:
            self.levels(sub)
        except ValueError:
            return False
        return True

    def largest(self) -> SubNetwork:
        """The first option everywhere."""
        return self.build([0] * len(self.genes))

    def smallest(self) -> SubNetwork:
        """The last option everywhere."""
        return self.build([len(gene.options) - 1 for gene in self.genes])

    @property
    def size(self) -> float:
        """How many sub-networks there are, as a power of ten."""
        return sum(math.log10(len(gene.options)) for gene in self.genes)

    def sample(self, rng: random.Random) -> SubNetwork:
        """A sub-network with every option of every gene equally likely."""
        return self.build([rng.randrange(len(gene.options)) for gene in self.genes])

    def neighbours(self, sub: SubNetwork) -> list[SubNetwork]:
        """All sub-networks that differ in one gene by one level."""
        levels, found = self.levels(sub), []
        for g, gene in enumerate(self.genes):
            for level in (levels[g] - 1, levels[g] + 1):
                if 0 <= level < len(gene.options):
                    found.append(self.build([*levels[:g], level, *levels[g + 1 :]]))
        return found

    def reach(self, cost: Cost) -> tuple[float, float]:
        """The least and the greatest cost in the space, for a cost that does not fall where a width grows."""
        return cost(self.smallest()), cost(self.largest())

    def window(self, cost: Cost, keep: float, *, of: float | None = None, slack: float = 0.005) -> tuple[float, float]:
        """The costs (lo, hi) that count as keeping the share `keep`: nothing above it, and down to `slack` below it.

        of: the cost that is 100 % (default: that of the largest sub-network of the space).
        Raises UserError with the reachable shares where the space has no such sub-network.
        """
        least, most = self.reach(cost)
        whole = most if of is None else of
        if not 0 < keep <= 1 or keep * whole < least or keep * (1 - slack) * whole > most:
            raise UserError(
                f"cannot keep {keep:.6g}: the share is out of reach of this search space, which goes from "
                f"{least / whole:.4g} to {min(1.0, most / whole):.4g}; choose a share in this range, or a space with "
                "smaller widths (whole layers, a finer mlp step, smaller hidden sizes)"
            )
        return keep * (1 - slack) * whole, keep * whole

    def key(self) -> str:
        """A short name that differs for different spaces (16 hexadecimal digits)."""
        text = json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _distance(option: Any, value: Any) -> tuple[int, ...]:
    if isinstance(option, tuple):
        return abs(option[0] * option[1] - value[0] * value[1]), abs(option[0] - value[0])
    return (abs(option - value),)


def space_of(
    config: Any,
    *,
    mlp_step: int = 32,
    attention: AttentionUnit = "grid",
    depth: bool = True,
    uniform: bool = False,
    hidden: Sequence[int] | None = None,
    layer_order: Sequence[int] | None = None,
) -> SearchSpace:
    """The search space of a model.

    mlp_step: MLP widths are the multiples of this number, and the full width.
    attention: "grid" cuts KV groups and query heads of all groups alike, "groups" whole KV groups with their query
        heads, "none" leaves attention as it is.
    depth: sub-layers may be dropped (in a uniform space: whole layers, the least important ones).
    uniform: all layers alike, as a stock config.json needs it.
    hidden: hidden sizes to choose from (default: only the model's own).
    layer_order: layers, most important first, for uniform spaces; layer 0 is always kept and need not be first
        (default, without scores: layers about two thirds of the way up are dropped first, the ends last).
    Raises UserError where the numbers do not fit the model.
    """
    d, n_layers = dims(config), int(config.num_hidden_layers)
    full = d["mlp"]
    if not 1 <= mlp_step <= full:
        raise UserError(f"mlp_step {mlp_step} is outside 1..{full}, the MLP width of this model")
    widths = [full, *(w for w in range(full // mlp_step * mlp_step, 0, -mlp_step) if w != full)]
    heads = _heads(d["kv_heads"], d["q_per_kv"], attention)
    sizes = sorted(set(hidden or (d["hidden"],)), reverse=True)
    if not 1 <= sizes[-1] <= sizes[0] <= d["hidden"]:
        raise UserError(f"hidden sizes {sizes} are not all in 1..{d['hidden']}, the hidden size of this model")
    if uniform:
        order = _order(n_layers, layer_order)
        depths = tuple(range(n_layers, 0, -1)) if depth else (n_layers,)
        return SearchSpace(
            (tuple(heads),) * n_layers, (tuple(widths),) * n_layers, tuple(sizes), True, depths, tuple(order)
        )
    drop_heads = [(0, 0)] if depth and attention != "none" else []
    return SearchSpace(
        attention=tuple(tuple(heads + drop_heads if i else heads) for i in range(n_layers)),
        mlp=tuple(tuple(widths + [0] * depth) for _ in range(n_layers)),
        hidden=tuple(sizes),
    )


def _heads(groups: int, per_group: int, unit: AttentionUnit) -> list[Heads]:
    if unit in ("whole", "none"):
        return [(groups, per_group)]
    if unit == "groups":
        return [(g, per_group) for g in range(groups, 0, -1)]
    if unit != "grid":
        raise UserError(f"attention {unit!r} is unknown; choose grid, groups, whole or none")
    grid = [(g, q) for g in range(1, groups + 1) for q in range(1, per_group + 1)]
    return sorted(grid, key=lambda h: (h[0] * h[1], h[0]), reverse=True)


def _order(n_layers: int, order: Sequence[int] | None) -> list[int]:
    """Layers, most important first, layer 0 in front."""
    if order is None:  # redundant layers sit in the second half, before the last ones
        distance = {i: abs(i - 0.65 * (n_layers - 1)) for i in range(n_layers)}
        order = sorted(range(n_layers), key=lambda i: distance[i], reverse=True)
    if sorted(order) != list(range(n_layers)):
        raise UserError(f"layer_order must name each of the {n_layers} layers once; given: {list(order)}")
    return [0, *(i for i in order if i)]


__all__ = ["AttentionUnit", "Cost", "Gene", "Heads", "Levels", "SearchSpace", "space_of"]
