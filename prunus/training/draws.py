"""Floor 3: which sub-networks a training sees: drawn at random, or the best of every bin of parameter counts.

A uniform draw of widths is a skewed draw of sizes: products of uniform numbers are mostly small. So sizes are cut into
K bins of equal width and each gets one network, which cures the skew (Sukthanker et al. 2024, arXiv:2410.06479v1,
sec. 4.1: "calibrated" sampling; the linear grid is of its code).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from prunus.errors import UserError
from prunus.models import costs
from prunus.models.families import Family
from prunus.models.slicing import state_of
from prunus.searching.grids import Space, along
from prunus.searching.space import Cost
from prunus.subnetwork import LayerShape, SubNetwork

Sampler = Literal["random", "grid", "grid-params", "calibrated-magnitude", "calibrated-ppl", "calibrated-kl"]
Strategy = Literal["standard", "random", "sandwich", "sandwich-grid"]
Score = Callable[[SubNetwork], float]  # lower is better
UNITS = ("kv_heads", "q_per_kv", "mlp")


@dataclass(frozen=True)
class Bin:
    """One bin of sizes: low <= cost < high."""

    low: float
    high: float
    candidates: tuple[SubNetwork, ...]
    chosen: SubNetwork | None  # None where the bin stayed empty


@dataclass(frozen=True)
class Pool:
    """What sub-networks are drawn from."""

    networks: tuple[SubNetwork, ...]  # from the smallest to the largest; empty: drawn from the space anew each time
    bins: tuple[Bin, ...] = ()
    attempts: int = 0

    @property
    def empty(self) -> tuple[tuple[float, float], ...]:
        """Bins that no draw fell into."""
        return tuple((one.low, one.high) for one in self.bins if one.chosen is None)


def magnitude(model: nn.Module, family: Family) -> Score:
    """Minus the sum of a sub-network's absolute weights, tied ones once: the largest is best (as in their code)."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())

    def score(sub: SubNetwork) -> float:
        with torch.no_grad():
            return -sum(float(t.float().abs().sum()) for k, t in state_of(model, family, sub).items() if k not in tied)

    return score


def fill(
    space: Space, cost: Cost, *, bins: int, draws: int, trials: int, rng: random.Random, least: float = 0.0
) -> tuple[list[Bin], int]:
    """Up to `draws` different networks of every bin between the smallest (or `least`) and the largest, by rejection.

    Random networks go into the bin that they fall into while it has room, which is what drawing for each bin until one
    falls into it gives, at less cost. Ends when all bins are full or after `trials` x `bins` attempts.
    Returns the bins, none of them decided yet, and the number of attempts.
    """
    least, most = max(least, cost(space.smallest())), cost(space.largest())
    if not least < most:
        raise UserError("all sub-networks of this space have one size, so there are no bins to draw from")
    found: list[dict[SubNetwork, None]] = [{} for _ in range(bins)]
    attempts, missing = 0, bins * draws
    while attempts < trials * bins and missing:
        attempts += 1
        sub = space.sample(rng)
        k = min(bins - 1, math.floor((cost(sub) - least) / (most - least) * bins))
        if k >= 0 and len(found[k]) < draws and sub not in found[k]:
            found[k][sub] = None
            missing -= 1
    edges = [least + (most - least) * k / bins for k in range(bins + 1)]
    return [Bin(edges[k], edges[k + 1], tuple(subs), None) for k, subs in enumerate(found)], attempts


def pool_of(
    space: Space,
    cost: Cost,
    sampler: Sampler,
    *,
    bins: int = 22,
    draws: int = 10,
    trials: int = 1000,
    seed: int = 0,
    least: float = 0.0,
    score: Score | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Pool:
    """The networks that a training draws from.

    "random": the whole space; "grid": `bins` steps from the smallest to the largest along every width at once;
    "grid-params": one random network of each bin; "calibrated-...": the one of `draws` in each bin with the best score.
    least: cost of the smallest networks in the bins (default: the space's smallest, which then is in the pool).
    score: needed for the calibrated ones. advance is told the bins that are decided.
    Raises UserError where no bin holds any network.
    """
    ends = (space.smallest(), space.largest())
    if sampler == "random":
        return Pool(())
    if sampler == "grid":
        return Pool(_unique([along(space, k / (bins - 1)) for k in range(bins)] if bins > 1 else ends))
    one = sampler == "grid-params"
    if not one and score is None:
        raise ValueError(f"{sampler} needs a score")
    refuse_empty(space, cost, sampler, bins=bins, trials=trials, seed=seed, least=least)
    rng = _generator(sampler, seed)
    filled, attempts = fill(space, cost, bins=bins, draws=1 if one else draws, trials=trials, rng=rng, least=least)
    decided = []
    for b in filled:
        best = (
            b.candidates[0] if one and b.candidates else min(b.candidates, key=score, default=None) if score else None
        )
        decided.append(Bin(b.low, b.high, b.candidates, best))
        advance(1)
    chosen = [b.chosen for b in decided if b.chosen is not None]
    smallest = [ends[0]] if cost(ends[0]) >= least else []
    return Pool(_unique([*smallest, *chosen, ends[1]]), tuple(decided), attempts)


def refuse_empty(
    space: Space, cost: Cost, sampler: Sampler, *, bins: int, trials: int, seed: int, least: float
) -> None:
    """Raise UserError where no bin would hold any network but the full one; the first one that does settles that."""
    if sampler in ("random", "grid"):
        return
    rng = _generator(sampler, seed)
    (whole,), attempts = fill(space, cost, bins=1, draws=2, trials=trials * bins, rng=rng, least=least)
    if not {*whole.candidates} - {space.largest()}:
        raise UserError(
            f"none of {attempts} draws but the full network fell into a bin; give a lower train.least, more attempts "
            "(train.trials) or another --space"
        )


def _generator(sampler: Sampler, seed: int) -> random.Random:
    return random.Random(f"{sampler == 'grid-params'} {seed}")


def _unique(subs: Iterable[SubNetwork]) -> tuple[SubNetwork, ...]:
    return tuple(dict.fromkeys(subs))


def draw_of(
    space: Space, pool: Pool, strategy: Strategy, n_drawn: int
) -> Callable[[random.Random], Sequence[SubNetwork | None]]:
    """The networks of one step, None for the full one, as a function of a generator.

    "standard": the full network. "random": one drawn. "sandwich": full, `n_drawn` drawn, smallest of the pool (or of
    the space; eq. 1 of the paper). "sandwich-grid": full and `n_drawn` drawn (its code: 3).
    Beside the full network others are drawn: a second pass of it would teach it nothing new.
    Raises UserError where there are no others.
    """
    whole, beside = space.largest(), strategy.startswith("sandwich")
    least = pool.networks[0] if pool.networks else space.smallest()
    some = [sub for sub in pool.networks if not (beside and sub == whole)]
    if beside and least == whole:
        raise UserError(
            f"there is nothing but the full network to draw from, which a {strategy} trains anyway; give a lower "
            "train.least, more attempts (train.trials), another --space, or --strategy standard"
        )

    def one(rng: random.Random) -> SubNetwork | None:
        if some:
            sub = rng.choice(some)
        else:
            while (sub := space.sample(rng)) == whole and beside:
                pass
        return None if sub == whole else sub

    def draw(rng: random.Random) -> Sequence[SubNetwork | None]:
        if strategy == "standard":
            return [None]
        if strategy == "random":
            return [one(rng)]
        drawn = [one(rng) for _ in range(n_drawn)]
        return [None, *drawn, least] if strategy == "sandwich" else [None, *drawn]

    return draw


def in_brief(sub: SubNetwork, layout: costs.Layout) -> str:
    """A sub-network in a few words: its size, and its widths from the least to the most."""
    whole = SubNetwork(layout.whole["hidden"], (LayerShape(*(layout.whole[u] for u in UNITS)),) * layout.n_layers)
    own, all_ = (costs.parameters(layout, one, "all") for one in (sub, whole))
    heads = [s.kv_heads * s.q_per_kv for s in sub.layers if s.attends]
    neurons = [s.mlp for s in sub.layers if s.mlp]
    widths = [f"{_span(heads)} query heads in {len(heads)}", f"{_span(neurons)} neurons in {len(neurons)}"]
    return (
        f"{own:,} parameters, {own / all_:.1%} of all: hidden size {sub.hidden}, {' and '.join(widths)} of "
        f"{layout.n_layers} layers; {sub.key()}"
    )


def _span(widths: Sequence[int]) -> str:
    low, high = min(widths, default=0), max(widths, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def histogram(
    space: Space, cost: Cost, pool: Pool | None, *, bins: int = 21, n: int = 2000, seed: int = 0
) -> list[int]:
    """How many of n draws fall into each of `bins` bins of size: of a pool, or of the space itself."""
    rng, counts = random.Random(f"histogram {seed}"), [0] * bins
    least, most = cost(space.smallest()), cost(space.largest())
    for _ in range(n):
        sub = rng.choice(pool.networks) if pool and pool.networks else space.sample(rng)
        counts[min(bins - 1, int((cost(sub) - least) / (most - least) * bins))] += 1
    return counts


__all__ = [
    "Bin", "Pool", "Sampler", "Strategy", "draw_of", "fill", "histogram", "in_brief", "magnitude", "pool_of",
    "refuse_empty",
]  # fmt: skip
