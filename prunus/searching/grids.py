"""Floor 1: search spaces that all layers share: hidden size x heads x MLP width x depth. Pure data, no torch.

The spaces of Sukthanker et al. 2024 (arXiv:2410.06479; sec. 3 and the code of its third version), by their names there,
for any model. Sub-networks are prefixes of the sorted super-network, whole layers leave in the order of importance, and
every space has the full network in it. Heads are never made smaller (docs/decisions.md, 3).
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
LEAST_HIDDEN = 64  # where hidden sizes are a range, it begins here (or at half of a smaller model's)


@dataclass(frozen=True)
class Grid:
    """A product of few choices; each list has its largest option first.

    mlp: neurons, or with `ratio` multiples of the hidden size chosen. own: heads and MLP are chosen for each layer.
    log_hidden: hidden sizes are drawn log-uniformly.
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
        return max(1, min(self.widest, round(mlp * hidden))) if self.ratio else int(mlp)

    def largest(self) -> SubNetwork:
        """The first option everywhere: the full network."""
        return self.build([0] * len(self.genes))

    def smallest(self) -> SubNetwork:
        """The last option everywhere."""
        return self.build([len(gene.options) - 1 for gene in self.genes])

    def sample(self, rng: random.Random) -> SubNetwork:
        """A sub-network with every option of every gene equally likely, hidden sizes log-uniform where they are so."""
        levels = [rng.randrange(len(gene.options)) for gene in self.genes]
        if self.log_hidden:
            drawn = math.exp(rng.uniform(math.log(self.hidden[-1]), math.log(self.hidden[0])))
            levels[0] = min(range(len(self.hidden)), key=lambda k: abs(self.hidden[k] - drawn))
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
    """The network at `share` (0: smallest, 1: largest) of the way through every gene: the linear grid of the paper."""
    return space.build([round((1 - share) * (len(gene.options) - 1)) for gene in space.genes])


def cuts_hidden(space: Space) -> bool:
    """True if sub-networks of the space may have fewer hidden channels."""
    return len(space.hidden) > 1


def grid_of(config: Any, name: Name, *, layer_order: Sequence[int] | None = None, mlp_step: int = 32) -> Space:
    """The space `name` for a model.

    llama_joint, llama_heads: hidden sizes 32, 64, ... and the model's, 1 .. all query heads of every KV group (a power
        of two of them), MLP 1, 2, ... times the hidden size, any depth. llama, llama2: the same with all heads; llama2
        with any hidden size from 64 on. hw_gpt_bench: any hidden size, any heads, whole MLP ratios. small: any hidden
        size, heads, neurons. medium: small, with heads and neurons of each layer. groups (ours): hidden size kept, KV
        groups x query heads x neurons, all layers alike. layers (ours): the space of the search, each layer by itself.
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
    every = tuple(range(d["hidden"], max(1, min(LEAST_HIDDEN, d["hidden"] // 2)) - 1, -1))
    powers = tuple(sorted({*(2**k for k in range(5, d["hidden"].bit_length()) if 2**k <= d["hidden"]), d["hidden"]}))
    ratios, whole = _ratios(d["mlp"] / d["hidden"]), d["mlp"]
    all_heads = ((d["kv_heads"], d["q_per_kv"]),)
    any_heads = tuple((d["kv_heads"], q) for q in range(d["q_per_kv"], 0, -1))
    if d["q_per_kv"] == 1:  # no heads inside groups to choose from: whole groups
        any_heads = tuple(_heads(d["kv_heads"], 1, "groups"))
    halves = tuple(h for h in any_heads if _is_power(any_heads[0][0] * any_heads[0][1] / (h[0] * h[1]))) or any_heads
    if name in ("llama_joint", "llama_heads"):
        return Grid(powers[::-1], halves if len(halves) > 1 else any_heads, ratios, depths, order, whole, ratio=True)
    if name in ("llama", "llama2"):
        hidden = every if name == "llama2" else powers[::-1]
        return Grid(hidden, all_heads, ratios, depths, order, whole, ratio=True, log_hidden=name == "llama2")
    if name == "hw_gpt_bench":
        return Grid(every, any_heads, ratios, depths, order, whole, ratio=True, log_hidden=True)
    neurons = tuple(float(k) for k in range(whole, 0, -1))
    return Grid(every, any_heads, neurons, depths, order, whole, own=name == "medium", log_hidden=True)


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
    widths = sorted({space._neurons(mlp, hidden) for mlp in space.mlp for hidden in space.hidden}, reverse=True)
    n = space.n_layers
    return SearchSpace(
        (space.heads,) * n, (tuple(widths),) * n, space.hidden, True, space.depths, space.layer_order
    )  # fmt: skip


def _ratios(most: float) -> tuple[float, ...]:
    """1, 2, ... times the hidden size, the last half step if it fits, and the model's own ratio."""
    whole = math.floor(most)
    found = {*map(float, range(1, whole + 1)), most}
    if whole + 0.5 < most:
        found.add(whole + 0.5)
    return tuple(sorted(found, reverse=True))


def _is_power(x: float) -> bool:
    return x >= 1 and math.log2(x).is_integer()


__all__ = ["NAMES", "Grid", "Name", "Space", "along", "cuts_hidden", "grid_of", "searchable"]
