"""Floor 1: search spaces that all layers share: hidden size x heads x MLP width x depth. Pure data, no torch.

The spaces of Sukthanker et al. 2024 (arXiv:2410.06479; sec. 3 and the code of its third version), by their names there,
for any model. Sub-networks are prefixes of the sorted super-network, whole layers leave in the order of importance, and
the largest network is always the full one, as in their sandwiches, also where the ratios of a space stop below it.
Heads are never made smaller (docs/decisions.md, 3), and every KV group stays, as there, except where each has one head.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from prunus.errors import UserError
from prunus.models.families import dims
from prunus.searching.space import Gene, Heads, SearchSpace, _heads, _order, space_of
from prunus.subnetwork import LayerShape, SubNetwork

Name = Literal["llama_joint", "llama_heads", "llama", "llama2", "hw_gpt_bench", "small", "medium", "groups", "layers"]
NAMES: tuple[Name, ...] = (
    "llama_joint", "llama_heads", "llama", "llama2", "hw_gpt_bench", "small", "medium", "groups", "layers",
)  # fmt: skip
LEAST_HIDDEN = 64  # where a range of hidden sizes does not begin at 1, it begins here (or at half of a smaller model's)


@dataclass(frozen=True)
class Grid:
    """A product of few choices; each list has its largest option first.

    mlp: neurons, or with `ratio` multiples of the hidden size chosen. own: heads and MLP are chosen for each layer.
    log_hidden: hidden sizes are all whole numbers between two, drawn log-uniformly.
    """

    hidden: tuple[int, ...]
    heads: tuple[Heads, ...]
    mlp: tuple[float, ...]
    depths: tuple[int, ...]
    layer_order: tuple[int, ...]  # most important first, layer 0 in front; the last ones are dropped
    widest: int  # neurons of the whole MLP
    ratio: bool = False
    own: bool = False
    log_hidden: bool = False

    @property
    def n_layers(self) -> int:
        return len(self.layer_order)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """Every decision: the hidden size, heads and MLP (of each layer), the depth."""
        if not self.own:
            inner = [Gene("attention", self.heads), Gene("mlp", self.mlp)]
        else:
            parts = (("attention", self.heads), ("mlp", self.mlp))
            inner = [Gene(f"L{i:02}.{name}", options) for i in range(self.n_layers) for name, options in parts]
        return (Gene("hidden", self.hidden), *inner, Gene("layers", self.depths))

    def build(self, levels: Sequence[int]) -> SubNetwork:
        """The sub-network that chooses option `levels[g]` of every gene g."""
        hidden, *inner, depth = [gene.options[level] for gene, level in zip(self.genes, levels, strict=True)]
        pairs = list(zip(inner[::2], inner[1::2], strict=True)) * (1 if self.own else self.n_layers)
        alive = set(self.layer_order[:depth])
        return SubNetwork(
            hidden,
            tuple(
                LayerShape(heads[0], heads[1], self._neurons(mlp, hidden)) if i in alive else LayerShape(0, 0, 0)
                for i, (heads, mlp) in enumerate(pairs)
            ),
        )

    def _neurons(self, mlp: float, hidden: int) -> int:
        return min(self.widest, int(mlp * hidden + 1e-6)) if self.ratio else int(mlp)

    def largest(self) -> SubNetwork:
        """The full network: the first option everywhere, and whole MLPs."""
        shape = LayerShape(*self.heads[0], self.widest)
        return SubNetwork(self.hidden[0], (shape,) * self.n_layers)

    def smallest(self) -> SubNetwork:
        """The last option everywhere."""
        return self.build([len(gene.options) - 1 for gene in self.genes])

    def sample(self, rng: random.Random) -> SubNetwork:
        """A sub-network with every option of every gene equally likely, hidden sizes log-uniform where they are so."""
        levels = [rng.randrange(len(gene.options)) for gene in self.genes]
        if self.log_hidden:
            drawn = math.exp(rng.uniform(math.log(self.hidden[-1]), math.log(self.hidden[0])))
            levels[0] = self.hidden[0] - round(drawn)
        return self.build(levels)

    @property
    def size(self) -> float:
        """How many sub-networks there are, as a power of ten."""
        return sum(math.log10(len(gene.options)) for gene in self.genes)

    def key(self) -> str:
        """A short name that differs for different spaces (16 hexadecimal digits)."""
        text = json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


Space = Grid | SearchSpace


def along(space: Space, share: float) -> SubNetwork:
    """The network at `share` (0: smallest, 1: largest) of the way through every width: the linear grid of their code.

    Widths themselves are interpolated, KV groups and query heads in each apart; the nearest option stands for each.
    """
    if share == 1:
        return space.largest()
    nearest = {options: _nearest(options, share) for options in {gene.options for gene in space.genes}}
    return space.build([nearest[gene.options] for gene in space.genes])


def _nearest(options: Sequence[Any], share: float) -> int:
    """The option nearest to `share` of the way from the last to the first, every number of it by its own range."""
    parts = [option if isinstance(option, tuple) else (option,) for option in options]
    ranges = [(low, high) for low, high in zip(parts[-1], parts[0], strict=True)]
    aims = [low + share * (high - low) for low, high in ranges]

    def away(k: int) -> float:
        far = zip(parts[k], aims, ranges, strict=True)
        return math.fsum(abs(part - aim) / (high - low) for part, aim, (low, high) in far if high > low)

    return min(range(len(options)), key=away)


def cuts_hidden(space: Space) -> bool:
    """True if sub-networks of the space may have fewer hidden channels."""
    return len(space.hidden) > 1


def grid_of(config: Any, name: Name, *, layer_order: Sequence[int] | None = None, mlp_step: int = 32) -> Space:
    """The space `name` for a model. Their ranges; depths are 1 .. all layers everywhere.

    llama_joint, llama_heads: hidden sizes 32, 64, ... (powers of two) and the model's; all, half or a quarter of the
        query heads (of 32: 32, 16, 8); MLPs of 1, 2, ... times the hidden size, the last half and the model's own ratio
        (1, 2, 3, 3.5). llama2: the same ratios, all heads, any hidden size from 64 on. llama: any hidden size, all
        heads, MLPs of 1, 2, ... times it, no more than the model's ratio. hw_gpt_bench: any hidden size, heads 1 ..
        all, MLPs of 1 .. 4 times. small: any hidden size from 64 on, heads, neurons. medium: small, with heads and
        neurons of each layer. groups (ours): hidden size kept, KV groups x query heads x neurons, all layers alike.
        layers (ours): the space of the search, each layer by itself.
    layer_order: layers, most important first (default: as `space_of`). Raises UserError for an unknown name.
    """
    if name not in NAMES:
        raise UserError(f"no search space {name!r}; known are {', '.join(NAMES)}")
    d, n = dims(config), int(config.num_hidden_layers)
    step = min(mlp_step, d["mlp"])
    if name == "groups":
        return space_of(config, mlp_step=step, uniform=True, layer_order=layer_order)
    if name == "layers":
        return space_of(config, mlp_step=step)
    order, depths = tuple(_order(n, layer_order)), tuple(range(n, 0, -1))
    least = max(1, min(LEAST_HIDDEN, d["hidden"] // 2))
    every, above = tuple(range(d["hidden"], 0, -1)), tuple(range(d["hidden"], least - 1, -1))
    powers = tuple(sorted({*(2**k for k in range(5, d["hidden"].bit_length())), d["hidden"]}, reverse=True))
    ratio, whole = d["mlp"] / d["hidden"], d["mlp"]
    all_heads = ((d["kv_heads"], d["q_per_kv"]),)
    any_heads = tuple((d["kv_heads"], q) for q in range(d["q_per_kv"], 0, -1))
    if d["q_per_kv"] == 1:  # no heads inside groups to choose from: whole groups
        any_heads = tuple(_heads(d["kv_heads"], 1, "groups"))
    n_heads = d["kv_heads"] * d["q_per_kv"]
    halves = tuple(h for h in any_heads if n_heads / (h[0] * h[1]) in (1, 2, 4))
    if name in ("llama_joint", "llama_heads"):
        some = halves if len(halves) > 1 else any_heads
        return Grid(powers, some, _ratios(ratio), depths, order, whole, ratio=True)
    if name == "llama2":
        return Grid(above, all_heads, _ratios(ratio), depths, order, whole, ratio=True, log_hidden=True)
    if name == "llama":
        return Grid(every, all_heads, _whole_ratios(ratio), depths, order, whole, ratio=True, log_hidden=True)
    if name == "hw_gpt_bench":
        return Grid(every, any_heads, _whole_ratios(4), depths, order, whole, ratio=True, log_hidden=True)
    neurons = tuple(float(k) for k in range(whole, 0, -1))
    return Grid(above, any_heads, neurons, depths, order, whole, own=name == "medium", log_hidden=True)


def searchable(space: Space, config: Any, *, mlp_step: int = 32) -> SearchSpace:
    """The same widths as a space that can be searched: every MLP width of a grid at every one of its hidden sizes.

    A space in which layers have widths of their own becomes one of that kind, with MLP widths in steps of `mlp_step`.
    """
    if isinstance(space, SearchSpace):
        return space
    if space.own:
        found = space_of(config, mlp_step=min(mlp_step, space.widest), hidden=space.hidden)
        gone = [tuple(h for h in found.attention[i] if h == (0, 0)) for i in range(space.n_layers)]
        return replace(found, attention=tuple((*space.heads, *none) for none in gone))
    hidden = space.hidden if space.ratio else space.hidden[:1]  # which neurons depend on
    widths = {space._neurons(mlp, one) for mlp in space.mlp for one in hidden} | {space.widest}
    n = space.n_layers
    return SearchSpace(
        (space.heads,) * n, (tuple(sorted(widths, reverse=True)),) * n, space.hidden, True, space.depths,
        space.layer_order,
    )  # fmt: skip


def _ratios(most: float) -> tuple[float, ...]:
    """1, 2, ... times the hidden size, the last half step if it fits, and the model's own ratio."""
    found = {*_whole_ratios(most), most}
    if math.floor(most) + 0.5 < most:
        found.add(math.floor(most) + 0.5)
    return tuple(sorted(found, reverse=True))


def _whole_ratios(most: float) -> tuple[float, ...]:
    """..., 2, 1 times the hidden size."""
    return tuple(float(k) for k in range(max(1, math.floor(most)), 0, -1))


__all__ = ["NAMES", "Grid", "Name", "Space", "along", "cuts_hidden", "grid_of", "searchable"]
