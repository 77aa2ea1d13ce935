"""Floor 3: the evolutionary search of Shen et al. 2024, "Search for Efficient Large Language Models", as published.

arXiv:2409.17372, sections 3.2 and 3.3, table 1, algorithm 1 and the settings of section 4.1. What the text leaves
open, and where this differs, is listed in docs/search.md. The fitness is whatever the objective gives; theirs is
perplexity on a few fixed training samples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from prunus.errors import UserError
from prunus.searching.moves import Floats, Mask, Prices, Window, settle
from prunus.searching.search import Found
from prunus.searching.space import Cost, SearchSpace
from prunus.searching.study import Judged, Ledger, Objective, Record, Tell
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

Members = tuple[int, ...]  # which units a mask keeps, ascending

# Table 1: target -> (least attention ratio, least MLP ratio, depth ranges by the depth of the model). The table prints
# .3 for attention at 70 %, between .8 and .6, which must be .7. Of its two models of 32 layers LLaMA-7B is used.
RANGES: Mapping[float, tuple[float, float, Mapping[int, tuple[int, int]]]] = {
    0.9: (0.9, 0.6, {n: (n, n) for n in (12, 24, 32, 40, 60, 80)}),
    0.8: (0.8, 0.4, {n: (n, n) for n in (12, 24, 32, 40, 60, 80)}),
    0.7: (0.7, 0.2, {12: (10, 12), 24: (20, 24), 32: (30, 32), 40: (36, 40), 60: (56, 60), 80: (76, 80)}),
    0.6: (0.6, 0.1, {12: (10, 12), 24: (20, 24), 32: (28, 32), 40: (32, 40), 60: (52, 60), 80: (72, 80)}),
    0.5: (0.6, 0.1, {12: (8, 12), 24: (16, 24), 32: (28, 32), 40: (32, 40), 60: (52, 60), 80: (72, 80)}),
}
ATTENTION_STEP, MLP_STEP = 0.01, 0.05  # of table 1's ratios
SETTLINGS = 4  # times to try to meet the constraint: settling is random


@dataclass(frozen=True)
class ShenSettings:
    """The published numbers (section 4.1)."""

    population: int = 100
    mutants: int = 50
    crossovers: int = 30  # the rest of the population is mutated with the initial probabilities
    parents: int = 10
    generations: int = 50  # the initial one included
    ratio_probability_initial: float = 0.3  # P_s^0
    mask_probability_initial: float = 0.6  # P_m^0
    ratio_probability: float = 0.1  # P_s
    mask_probability: float = 0.3  # P_m
    depth_probability: float = 0.1  # P_d
    similarity: float = 0.8  # alpha
    tries: int = 1000  # eta
    mask: Literal["repaired", "literal"] = "repaired"  # algorithm 1 as meant, or as printed
    rung: int = 0
    n_tokens: int | None = None  # forward tokens to spend at most; not in the paper

    def __post_init__(self) -> None:
        if not 1 <= self.parents <= self.population or self.mutants + self.crossovers > self.population:
            raise UserError(
                f"a population of {self.population} cannot hold {self.mutants} mutants, {self.crossovers} crossovers "
                f"and {self.parents} parents; ShenSettings.sized keeps the published shares"
            )

    @classmethod
    def sized(cls, population: int, generations: int) -> ShenSettings:
        """The published shares of another population: 50 % mutants, 30 % crossovers, 10 % parents."""
        mutants, crossovers, parents = (round(population * share) for share in (0.5, 0.3, 0.1))
        return cls(population, mutants, crossovers, max(1, parents), generations)


@dataclass(frozen=True)
class Genes:
    """One individual: how many layers, and what every layer keeps (dropped layers remember theirs)."""

    depth: int
    groups: tuple[Members, ...]
    slots: tuple[Members, ...]
    mlp: tuple[Members, ...]


@dataclass(frozen=True)
class Ranges:
    """What ratios and depths a target allows; least ratios, and depths inclusive."""

    attention: float
    mlp: float
    depth: tuple[int, int]


def ranges_of(target: float, n_layers: int) -> Ranges:
    """Table 1's row for the nearest target, its depths scaled from the model of the nearest depth."""
    nearest = min(RANGES, key=lambda t: abs(t - target))
    attention, mlp, depths = RANGES[nearest]
    like = min(depths, key=lambda n: abs(n - n_layers))
    low, high = depths[like]
    return Ranges(attention, mlp, (math.ceil(low / like * n_layers - 1e-9), round(high / like * n_layers)))


def mutate_mask(
    members: Members, size: int, n: int, probability: float, settings: ShenSettings, rng: random.Random
) -> Members:
    """Algorithm 1: another mask of `size` of n units that stays similar to the old one.

    The printed threshold, an overlap of alpha x n, can hardly be met by random subsets below a ratio of .88, and then
    the old mask comes back, perhaps with the wrong size. "repaired" keeps ceil(alpha x min(old, new size)) random old
    members and draws the others from all that is left, so that it always succeeds and differs where it can.
    """
    if len(members) == size and rng.random() > probability:
        return members
    if settings.mask == "literal":
        return _literal(members, size, n, settings, rng)
    overlap = math.ceil(settings.similarity * min(len(members), size) - 1e-9)
    stay = rng.sample(members, overlap)
    rest = sorted(set(range(n)) - set(stay))
    new = sorted(stay + rng.sample(rest, size - overlap))
    outside = sorted(set(range(n)) - set(new))
    if tuple(new) == members and overlap < size and outside:  # the same again by chance: exchange one
        leaver = rng.choice(sorted(set(new) - set(stay)))
        new = sorted((set(new) - {leaver}) | {rng.choice(outside)})
    return tuple(new)


def _literal(members: Members, size: int, n: int, settings: ShenSettings, rng: random.Random) -> Members:
    new: list[int] = []
    tried = 0
    while len(set(members) & set(new)) < settings.similarity * n and tried < settings.tries:
        new = rng.sample(range(n), size)
        tried += 1
    return tuple(sorted(new)) if tried < settings.tries else members


def shen(
    space: SearchSpace,
    objective: Objective,
    cost: Cost,
    budget: Window,
    *,
    target: float,
    layer_order: Sequence[int] | None = None,
    seed: int = 0,
    record: Record | None = None,
    settings: ShenSettings | None = None,
    progress: Tell | None = None,
) -> Found:
    """Evolution of per-layer ratios, depth and masks, judged on one fixed draw of tokens.

    budget: the costs (lo, hi) that every candidate meets. target: the ratio that chooses table 1's ranges.
    layer_order: layers, those dropped last first (default: the first layers stay, as in the released code).
    The super-network must be sorted by importance: the initial network keeps the first units of every layer.
    Sub-networks name their members where these are not a prefix.
    """
    if space.uniform:
        raise UserError("Shen's search gives every layer its own ratios; use a per-layer space, or another method")
    evolution = _Evolution(
        space, cost, budget, target, layer_order, settings or ShenSettings(), random.Random(f"shen {seed}")
    )
    ledger = Ledger(record or Record.open(None, space), objective, "shen", budget)
    return evolution.run(ledger, progress)


class _Evolution:
    """The state of one search: its generator of random numbers, and the constraint."""

    def __init__(
        self,
        space: SearchSpace,
        cost: Cost,
        budget: Window,
        target: float,
        layer_order: Sequence[int] | None,
        settings: ShenSettings,
        rng: random.Random,
    ) -> None:
        self.space, self.budget, self.s, self.rng = space, budget, settings, rng
        self.prices = Prices(space, cost)
        self.ranges = ranges_of(target, space.n_layers)
        order = list(layer_order or range(space.n_layers))
        self.order = [0, *(i for i in order if i)]
        whole = space.largest().layers
        share = self.shares()
        least = np.where(self.prices.is_mlp, self.ranges.mlp, self.ranges.attention)
        self.inside, self.present = share >= least - 1e-9, share > 0
        self.allowed: tuple[Mask, ...] = (self.inside,)  # widths to settle with, in this order
        self.n = [(s.kv_heads, s.q_per_kv, s.mlp) for s in whole]  # units of every layer
        self.heads = [[h for h in options if h != (0, 0)] for options in space.attention]
        self.widths = [[w for w in options if w] for options in space.mlp]
        self.droppable = all((0, 0) in space.attention[i] and 0 in space.mlp[i] for i in range(1, space.n_layers))
        if not self.droppable:
            self.ranges = replace(self.ranges, depth=(space.n_layers, space.n_layers))

    # ------------------------------------------------------------------------------------------ the search

    def run(self, ledger: Ledger, progress: Tell | None) -> Found:
        s = self.s
        initial = self.initial()
        first = self.sub_of(initial)
        [first_score] = ledger.judge([first], 0, s.rung)
        pool = [(first_score, initial)]
        generation, improved = 0, list[int]()
        while generation < s.generations:
            cost = s.population * ledger.objective.n_tokens(s.rung)
            if s.n_tokens is not None and ledger.n_tokens + cost > s.n_tokens:
                break
            new = self.first_generation(initial) if generation == 0 else self.next_generation([g for _, g in pool])
            scores = ledger.judge([self.sub_of(g) for g in new], 0, s.rung)
            best = pool[0][0].value
            pool = self.top(pool + list(zip(scores, new, strict=True)))
            if pool[0][0].value < best:
                improved.append(generation)
            generation += 1
            if progress is not None:
                tokens = f"{ledger.n_tokens / 1e6:.2f} M tokens"
                progress(f"shen {generation}/{s.generations}: best {pool[0][0].value:.5g}, {tokens}")
        score, genes = pool[0]
        n = (ledger.n_tokens, ledger.n_evaluations, generation)
        return Found(self.sub_of(genes), score, first, first_score, *n, tuple(improved))

    def top(self, pool: Iterable[tuple[Judged, Genes]]) -> list[tuple[Judged, Genes]]:
        """The k best different individuals, old parents included."""
        best: dict[Genes, Judged] = {}
        for score, genes in pool:
            best.setdefault(genes, score)
        ranked = sorted(best.items(), key=lambda item: item[1].value)
        return [(score, genes) for genes, score in ranked[: self.s.parents]]

    def first_generation(self, initial: Genes) -> list[Genes]:
        s = self.s
        return [
            self.mutant(initial, s.ratio_probability_initial, s.mask_probability_initial, 0.0)
            for _ in range(s.population)
        ]

    def next_generation(self, parents: list[Genes]) -> list[Genes]:
        s, rng = self.s, self.rng
        new = [
            self.mutant(rng.choice(parents), s.ratio_probability, s.mask_probability, s.depth_probability)
            for _ in range(s.mutants)
        ]
        new += [self.child(parents) for _ in range(s.crossovers)]
        rest = s.population - len(new)
        p = s.ratio_probability_initial, s.mask_probability_initial, s.depth_probability
        return new + [self.mutant(rng.choice(parents), *p) for _ in range(rest)]

    # ------------------------------------------------------------------------------------------ individuals

    def initial(self) -> Genes:
        """The same inheriting ratio in every block, the most important units kept; the constraint met by settling.

        Inside table 1's ranges if that is possible; all that follow are then, too.
        """
        everything = replace(self.ranges, attention=0.0, mlp=0.0)
        for ranges, allowed in ((self.ranges, (self.inside,)), (everything, (self.inside, self.present))):
            self.allowed = allowed
            low, high = 0.0, 1.0
            if self.cost_of(self.prefix(low, ranges)) > self.budget[1]:
                continue
            for _ in range(40):
                ratio = (low + high) / 2
                genes = self.prefix(ratio, ranges)
                low, high = (ratio, high) if self.cost_of(genes) <= self.budget[1] else (low, ratio)
            met = self.meet(self.prefix(low, ranges)) or self.meet(self.prefix(high, ranges))
            if met is not None:
                return met
        raise UserError(
            f"no network of {self.space.n_layers} layers costs {self.budget[0]:.6g} to {self.budget[1]:.6g} in "
            "this space; widen the window or make the steps of the space finer"
        )

    def prefix(self, ratio: float, ranges: Ranges) -> Genes:
        """A ratio for every block, raised to the least of its range."""
        attention, mlp = max(ratio, ranges.attention), max(ratio, ranges.mlp)
        shapes = [
            (*self.nearest_heads(i, attention, ranges), self.nearest_width(i, mlp, ranges))
            for i in range(self.space.n_layers)
        ]
        masks = [[tuple(range(shape[unit])) for shape in shapes] for unit in range(3)]
        return Genes(self.space.n_layers, tuple(masks[0]), tuple(masks[1]), tuple(masks[2]))

    def mutant(self, parent: Genes, ratio_p: float, mask_p: float, depth_p: float) -> Genes:
        """Depth, then ratios, then masks, then the constraint.

        Drawing again instead of settling would prefer mutants that change no ratio, where the window is narrow.
        """
        return self.meet(self.mutated(parent, ratio_p, mask_p, depth_p)) or parent

    def mutated(self, parent: Genes, ratio_p: float, mask_p: float, depth_p: float) -> Genes:
        rng, depth = self.rng, parent.depth
        if rng.random() < depth_p:
            depth = rng.randint(*self.ranges.depth)
        groups, slots, mlp = [], [], []
        for i, (n_groups, n_slots, n_mlp) in enumerate(self.n):
            kv, q, width = len(parent.groups[i]), len(parent.slots[i]), len(parent.mlp[i])
            if rng.random() < ratio_p:
                kv, q = self.nearest_heads(i, _ratio(self.ranges.attention, ATTENTION_STEP, rng), self.ranges)
            if rng.random() < ratio_p:
                width = self.nearest_width(i, _ratio(self.ranges.mlp, MLP_STEP, rng), self.ranges)
            groups.append(mutate_mask(parent.groups[i], kv, n_groups, mask_p, self.s, rng))
            slots.append(mutate_mask(parent.slots[i], q, n_slots, mask_p, self.s, rng))
            mlp.append(mutate_mask(parent.mlp[i], width, n_mlp, mask_p, self.s, rng))
        return Genes(depth, tuple(groups), tuple(slots), tuple(mlp))

    def child(self, parents: list[Genes]) -> Genes:
        """Each gene (depth, a layer's attention, a layer's MLP) from one of two parents."""
        rng = self.rng
        a, b = rng.sample(parents, 2) if len(parents) > 1 else (parents[0], parents[0])
        heads = [rng.choice((a, b)) for _ in self.n]
        mlps = [rng.choice((a, b)) for _ in self.n]
        genes = Genes(
            rng.choice((a, b)).depth,
            tuple(p.groups[i] for i, p in enumerate(heads)),
            tuple(p.slots[i] for i, p in enumerate(heads)),
            tuple(p.mlp[i] for i, p in enumerate(mlps)),
        )
        return self.meet(genes) or a

    # ------------------------------------------------------------------------------------------ constraint

    def meet(self, genes: Genes) -> Genes | None:
        """Change as few widths as possible until the constraint holds, first to such as are allowed first."""
        levels = self.space.levels(self.sub_of(genes))
        gone = np.isin(self.prices.gene, [g for i in self.order[genes.depth :] for g in (2 * i, 2 * i + 1)])
        for allowed in self.allowed:
            for _ in range(SETTLINGS):
                settled = settle(self.prices, levels, self.budget, self.rng, allowed & ~gone)
                if settled is not None:
                    return self.resized(genes, self.space.build(settled))
        return None

    def shares(self) -> Floats:
        """The share of its gene's units that every (gene, level) pair keeps; 0 for the hidden size, which is fixed."""
        shares = [
            (o[0] * o[1] if isinstance(o, tuple) else o) / (w[0] * w[1] if isinstance(w, tuple) else w)
            for gene in self.space.genes[:-1]
            for o, w in zip(gene.options, [gene.options[0]] * len(gene.options), strict=True)
        ]
        return np.array(shares + [0.0] * len(self.space.hidden))

    def resized(self, genes: Genes, sub: SubNetwork) -> Genes:
        """The same individual with the widths of `sub`."""
        columns: list[list[Members]] = [list(genes.groups), list(genes.slots), list(genes.mlp)]
        for i in self.order[: genes.depth]:
            shape = sub.layers[i]
            for column, size in zip(columns, (shape.kv_heads, shape.q_per_kv, shape.mlp), strict=True):
                column[i] = self.resize(column[i], size)
        return Genes(genes.depth, tuple(columns[0]), tuple(columns[1]), tuple(columns[2]))

    def resize(self, members: Members, size: int) -> Members:
        """The last units of a mask leave; the first absent ones join (units are sorted by importance)."""
        if size <= len(members):
            return members[:size]
        present = set(members)
        absent = (unit for unit in range(len(members) + size) if unit not in present)
        return tuple(sorted([*members, *(unit for unit, _ in zip(absent, range(size - len(members)), strict=False))]))

    def cost_of(self, genes: Genes) -> float:
        return self.prices.total(self.space.levels(self.sub_of(genes)))

    def sub_of(self, genes: Genes) -> SubNetwork:
        """The sub-network; layers beyond the depth keep nothing."""
        alive = set(self.order[: genes.depth])
        shapes, kept = [], []
        for i in range(self.space.n_layers):
            masks = (genes.groups[i], genes.slots[i], genes.mlp[i]) if i in alive else ((), (), ())
            shapes.append(LayerShape(*map(len, masks)))
            kept.append(LayerKept(*(None if m == tuple(range(len(m))) else m for m in masks)))
        plain = all(k == LayerKept() for k in kept)
        return SubNetwork(self.space.hidden[0], tuple(shapes), () if plain else tuple(kept))

    def nearest_heads(self, layer: int, ratio: float, ranges: Ranges) -> tuple[int, int]:
        """The (KV groups, heads per group) inside a range whose share of the layer's heads is nearest to a ratio."""
        whole = self.n[layer][0] * self.n[layer][1]
        inside = [h for h in self.heads[layer] if h[0] * h[1] >= ranges.attention * whole - 1e-9]
        return min(inside, key=lambda h: (abs(h[0] * h[1] / whole - ratio), -h[0]))

    def nearest_width(self, layer: int, ratio: float, ranges: Ranges) -> int:
        whole = self.n[layer][2]
        inside = [w for w in self.widths[layer] if w >= ranges.mlp * whole - 1e-9]
        return min(inside, key=lambda w: abs(w - ratio * whole))


def _ratio(least: float, step: float, rng: random.Random) -> float:
    """A ratio from [least, 1] on table 1's grid."""
    return least + step * rng.randint(0, round((1 - least) / step))


__all__ = ["RANGES", "Genes", "Ranges", "ShenSettings", "mutate_mask", "ranges_of", "shen"]
