"""Floor 2: constrained moves in a search space: what changes cost, and how to land inside a budget's window.

Costs are functions of whole sub-networks, but nearly all of them are sums over sub-blocks. So a table of single changes
is computed once, moves are planned with it, and the true cost decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prunus.errors import UserError
from prunus.searching.space import Cost, Levels, SearchSpace
from prunus.subnetwork import SubNetwork

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Window = tuple[float, float]
Predict = Callable[[SubNetwork], float]  # a cheap guess of the score, lower is better


class Prices:
    """What levels cost, and what every single change of a level would cost."""

    def __init__(self, space: SearchSpace, cost: Cost) -> None:
        self.space, self.cost = space, cost
        counts = [len(gene.options) for gene in space.genes]
        self.gene = np.repeat(np.arange(len(counts)), counts)  # of every (gene, level) pair
        self.level = np.concatenate([np.arange(n) for n in counts])
        self.first = np.concatenate([[0], np.cumsum(counts)[:-1]])  # where each gene's pairs begin
        self.is_mlp = np.array([gene.name.endswith("mlp") for gene in space.genes])[self.gene]
        self._totals: dict[Levels, float] = {}
        self._tables: dict[int, Floats] = {}

    def total(self, levels: Levels) -> float:
        """The true cost."""
        if levels not in self._totals:
            self._totals[levels] = float(self.cost(self.space.build(levels)))
        return self._totals[levels]

    def tables(self, hidden: int = 0) -> list[Floats]:
        """Cost of every level of every gene but the hidden size, above that gene's cheapest level (per-layer spaces).

        Sums of these, plus the cost of the smallest sub-network, are what `allocate` wants for costs that are sums.
        """
        flat = self._table(hidden)
        return [flat[self.gene == g] - flat[self.gene == g].min() for g in range(len(self.space.genes) - 1)]

    def changes(self, levels: Levels) -> Floats:
        """Cost after setting one gene to one level, for all (gene, level) pairs; exact where costs are sums."""
        here = self.total(levels)
        if self.space.uniform:
            return self._each(levels)
        table = self._table(levels[-1])
        flat: Floats = here + table - table[self.first + np.asarray(levels)][self.gene]
        if len(self.space.hidden) > 1:
            last = self.gene == len(levels) - 1
            flat[last] = [self.total((*levels[:-1], k)) for k in range(len(self.space.hidden))]
        return flat

    def _table(self, hidden: int) -> Floats:
        if hidden not in self._tables:
            self._tables[hidden] = self._each((*[0] * (len(self.space.genes) - 1), hidden))
        return self._tables[hidden]

    def _each(self, levels: Levels) -> Floats:
        pairs = zip(self.gene.tolist(), self.level.tolist(), strict=True)
        return np.array([self.total((*levels[:g], k, *levels[g + 1 :])) for g, k in pairs])


def settle(
    prices: Prices, levels: Levels, window: Window, rng: random.Random, free: Mask | None = None
) -> Levels | None:
    """Change as little as possible until the cost is inside the window; None if that does not succeed.

    free: which of all (gene, level) pairs may be chosen (default: all). MLP widths move first, their steps are finest.
    """
    lo, hi = window
    free = np.ones(prices.gene.size, dtype=np.bool_) if free is None else free
    for _ in range(4 * len(levels)):
        here = prices.total(levels)
        if lo <= here <= hi:
            return levels
        flat = prices.changes(levels)
        landing = np.flatnonzero(free & (lo <= flat) & (flat <= hi))
        if landing.size:
            mlp = landing[prices.is_mlp[landing]]
            pair: int | None = int(rng.choice((mlp if mlp.size else landing).tolist()))
        else:
            pair = _toward(prices, flat - here, (lo - here, hi - here), free, rng)
        if pair is None:
            return None
        levels = _set(prices, levels, pair)
    return None


def _set(prices: Prices, levels: Levels, pair: int) -> Levels:
    g, k = int(prices.gene[pair]), int(prices.level[pair])
    return (*levels[:g], k, *levels[g + 1 :])


def _toward(prices: Prices, delta: Floats, gap: Window, free: Mask, rng: random.Random) -> int | None:
    """A change after which one more can land, else one that shrinks the gap without leaping over it."""
    lo, hi = gap
    moving = np.flatnonzero(free & (delta != 0))
    ranked = moving[np.argsort(delta[moving], kind="stable")]
    values = delta[ranked]
    some = moving[rng.sample(range(moving.size), min(moving.size, 64))]
    left = np.searchsorted(values, lo - delta[some], side="left")
    right = np.searchsorted(values, hi - delta[some], side="right")
    for k in np.flatnonzero(left < right):
        if np.any(prices.gene[ranked[left[k] : right[k]]] != prices.gene[some[k]]):
            return int(some[k])
    wish = hi if hi < 0 else lo
    helping = moving[(delta[moving] * wish > 0) & (np.abs(delta[moving]) <= abs(wish))]
    if not helping.size:  # the gap is finer than any change: wander, two or three changes may land
        helping = moving[np.argsort(np.abs(delta[moving]), kind="stable")][:16]
    return int(rng.choice(helping.tolist())) if helping.size else None


def fit(prices: Prices, sub: SubNetwork, window: Window, rng: random.Random) -> SubNetwork | None:
    """A sub-network near to `sub` (perhaps of another size or another space) whose cost is inside the window.

    Far from the window all widths shrink or grow in proportion first, so that a neighbouring budget's result is a
    useful start. Members that `sub` names are kept only if nothing changes.
    """
    space = prices.space
    if space.contains(sub) and window[0] <= prices.cost(sub) <= window[1]:
        return sub
    levels = space.snap(sub)
    if not space.uniform:
        levels = _scale(prices, levels, window)
    for _ in range(20):
        found = settle(prices, levels, window, rng)
        if found is not None:
            return space.build(found)
    return None


def _scale(prices: Prices, levels: Levels, window: Window) -> Levels:
    middle, mlp = sum(window) / 2, [g for g, gene in enumerate(prices.space.genes) if gene.name.endswith("mlp")]
    for _ in range(8):
        here = prices.total(levels)
        if abs(here - middle) <= 0.02 * middle:
            break
        wish, moved = middle / here, list(levels)
        for g in mlp:
            options = np.asarray(prices.space.genes[g].options, dtype=np.float64)
            target = options[levels[g]] * wish if options[levels[g]] else 0.0
            moved[g] = int(np.argmin(np.abs(options - target)))
        if tuple(moved) == levels:
            break
        levels = tuple(moved)
    return levels


def mutate(
    prices: Prices, levels: Levels, window: Window, rng: random.Random, *, step: float, n_swaps: int, leap: float
) -> Levels | None:
    """Equal-cost swaps: lower one sub-block, raise another, as EvoPress switches levels; None if it fails.

    step: greatest change of one sub-block, in units of the cost. leap: probability of a change of any size.
    Raises nothing; the result is inside the window and differs from `levels`.
    """
    start, open_genes = levels, np.ones(len(levels), dtype=np.bool_)
    for _ in range(n_swaps):
        delta = prices.changes(levels) - prices.total(levels)
        free = open_genes[prices.gene] & (prices.level != np.asarray(levels)[prices.gene])
        within = free if rng.random() < leap else free & (np.abs(delta) <= step)
        pairs = np.flatnonzero(within if within.any() else free)
        if not pairs.size:
            break
        first = _of_random_gene(prices, pairs, rng)
        levels = _set(prices, levels, first)
        open_genes[prices.gene[first]] = False
        others = np.flatnonzero(free & (prices.gene != prices.gene[first]) & (delta * delta[first] < 0))
        if others.size:
            gene = prices.gene[_of_random_gene(prices, others, rng)]
            mine = others[prices.gene[others] == gene]
            second = int(mine[np.argmin(np.abs(delta[mine] + delta[first]))])
            levels = _set(prices, levels, second)
            open_genes[gene] = False
    found = settle(prices, levels, window, rng, open_genes[prices.gene]) or settle(prices, levels, window, rng)
    return None if found == start else found


def _of_random_gene(prices: Prices, pairs: NDArray[np.intp], rng: random.Random) -> int:
    gene = rng.choice(np.unique(prices.gene[pairs]).tolist())
    return int(rng.choice(pairs[prices.gene[pairs] == gene].tolist()))


def scatter(prices: Prices, window: Window, rng: random.Random, tries: int = 200) -> SubNetwork:
    """A random sub-network inside the window, its levels as equally likely as the budget lets them be.

    Levels are drawn with probabilities proportional to exp(-price x cost), the most even distribution of a given mean
    cost; then the little that is missing is settled. Raises UserError where the window cannot be met.
    """
    space = prices.space
    for _ in range(tries):
        if space.uniform:
            levels = space.levels(space.sample(rng))
        else:
            levels = _tilted(prices, rng.randrange(len(space.hidden)), rng.uniform(*window), rng)
        found = settle(prices, levels, window, rng)
        if found is not None:
            return space.build(found)
    least, most = space.reach(prices.cost)
    raise UserError(
        f"found no sub-network that costs {window[0]:.6g} to {window[1]:.6g} in {tries} tries; the space reaches from "
        f"{least:.6g} to {most:.6g}, so widen the window or make the steps of the space finer"
    )


def _tilted(prices: Prices, hidden: int, target: float, rng: random.Random) -> Levels:
    tables = prices.tables(hidden)
    base = prices.total((*[len(t) - 1 for t in tables], hidden))
    scale = max(float(t.max()) for t in tables) or 1.0

    def chances(price: float) -> list[Floats]:
        logits = [-price * t / scale for t in tables]
        odds = [np.exp(x - x.max()) for x in logits]
        return [x / x.sum() for x in odds]

    low, high = -200.0, 200.0
    for _ in range(40):
        price = (low + high) / 2
        mean = base + sum(float(p @ t) for p, t in zip(chances(price), tables, strict=True))
        low, high = (price, high) if mean > target else (low, price)
    drawn = [rng.choices(range(len(p)), weights=p.tolist())[0] for p in chances((low + high) / 2)]
    return (*drawn, hidden)


def gene_errors(space: SearchSpace, attention: ArrayLike, mlp: ArrayLike) -> list[Floats]:
    """Error curves in the order of a per-layer space's genes (without the hidden size), as `allocate` wants them.

    attention: (layers, groups + 1, heads per group + 1), errors with that many kept. mlp: (layers, neurons + 1).
    """
    a, m = np.asarray(attention, dtype=np.float64), np.asarray(mlp, dtype=np.float64)
    curves = []
    for i in range(space.n_layers):
        curves.append(np.array([a[i, kv, q] for kv, q in space.attention[i]]))
        curves.append(m[i][list(space.mlp[i])])
    return curves


def predictor(space: SearchSpace, errors: Sequence[ArrayLike]) -> Predict:
    """The sum of separable errors as a cheap guess of a sub-network's score, for per-layer spaces."""
    curves = [np.asarray(curve, dtype=np.float64) for curve in errors]

    def predict(sub: SubNetwork) -> float:
        return sum(float(curve[k]) for curve, k in zip(curves, space.levels(sub), strict=False))

    return predict


__all__ = [
    "Floats",
    "Mask",
    "Predict",
    "Prices",
    "Window",
    "fit",
    "gene_errors",
    "mutate",
    "predictor",
    "scatter",
    "settle",
]
