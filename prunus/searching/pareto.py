"""Floor 3: fronts: several things minimised together: level switches at every size, samplers of Optuna, Pareto local
search, or at random.

Deterministic in the seed and in what is measured, as `search.py`: called again on the same record, it resumes. Whole
batches are measured at once, so that several processes can share them.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState

from prunus.searching.moves import Predict, Prices, Window, fit, mutate, scatter
from prunus.searching.space import Cost, Levels, SearchSpace
from prunus.searching.study import Ledger, Objective, Record, Tell, Trial
from prunus.subnetwork import SubNetwork

Method = Literal["levels", "nsga2", "tpe", "local", "random"]
Measure = Callable[[Sequence[SubNetwork]], Sequence[float]]  # lower is better
T = TypeVar("T")
STEP = 0.5  # greatest change of one sub-block in a local move, in shares of an average whole sub-block
OVERSAMPLE = 8  # mutants of which the prediction chooses one
UNGUIDED = 0.25  # share of the offspring taken at random, whatever the prediction says
SWAPS = (1, 3)  # of one mutant
CROSSED = 0.5  # share of the mutants that take half of their genes from another member of the front


@dataclass(frozen=True)
class Point:
    """A network and what it was measured to be, in the order of the axes."""

    subnetwork: SubNetwork
    values: tuple[float, ...]


def explore(
    space: SearchSpace,
    axes: Sequence[Measure],
    cost: Cost,
    method: Method,
    window: Window,
    *,
    others: Sequence[tuple[Cost, Window]] = (),
    start: Sequence[SubNetwork] = (),
    predict: Predict | None = None,
    n_trials: int = 200,
    batch: int = 20,
    seed: int = 0,
    tell: Tell | None = None,
) -> list[Point]:
    """Every network that a search for a front has measured, `n_trials` of them, in their order; `front` chooses.

    window: the costs (lo, hi) that candidates are kept inside. start: networks to begin with; "random", the control,
    takes none: its networks have evenly spread costs. batch: measured together; the population of "nsga2".
    others, predict: for "levels" alone: further costs that its mutants are spread over in turn, each with its window;
    and a cheap guess of the first axis, which chooses between mutants of about the same cost.
    """
    if method in ("nsga2", "tpe"):
        own = sampler(method, batch, seed)
        return guided(
            space, axes, cost, own, window=window, start=start, n_trials=n_trials, batch=batch, seed=seed, tell=tell
        )
    rng, prices = random.Random(f"{method} front {seed}"), Prices(space, cost)
    sizes = [(prices, window), *((Prices(space, one), own) for one, own in others)]
    found: dict[SubNetwork, Point] = {}
    moved = (fit(prices, sub, window, rng) for sub in start if method != "random")
    fresh, generation = list(dict.fromkeys(sub for sub in moved if sub is not None)), 0
    while len(found) < n_trials:
        n = min(batch, n_trials - len(found))
        points = [] if method == "random" else front(found.values(), lambda p: p.values)
        best = [point.subnetwork for point in points]
        if fresh:
            subs, fresh = fresh[:n], fresh[n:]
        elif method == "levels" and best:
            subs = _spread(*sizes[generation % len(sizes)], best, found, predict, n, rng)
        else:
            subs = _drawn(prices, window, best, found, n, rng)
        if not subs:
            break  # the space has no other networks
        found |= {point.subnetwork: point for point in measured(subs, axes)}
        generation += 1
        if tell is not None:
            tell(f"{method} {len(found)}/{n_trials}")
    return list(found.values())


def _drawn(
    prices: Prices, window: Window, best: Sequence[SubNetwork], found: Container[SubNetwork], n: int, rng: random.Random
) -> list[SubNetwork]:
    """New neighbours of random members of a front; of an empty one, random networks of evenly spread costs."""
    subs: dict[SubNetwork, None] = {}
    for _ in range(20 * n):
        if len(subs) == n:
            break
        sub = _neighbour(prices, rng.choice(best), window, rng) if best else None
        sub = sub or scatter(prices, window, rng)
        if sub not in found:
            subs[sub] = None
    return list(subs)


def _spread(
    prices: Prices,
    window: Window,
    best: Sequence[SubNetwork],
    found: Container[SubNetwork],
    predict: Predict | None,
    n: int,
    rng: random.Random,
) -> list[SubNetwork]:
    """One new network in each of n parts of the window: a mutant of the members of the front that are nearest.

    Uniform parents crowd where a front has most members, which is where it was found easily; here every size has the
    same number of attempts. The parts are equal but for the outermost, and lie elsewhere in every generation, because
    the best network of a part is nearly always of its greatest cost. Mutants are level switches, as those of
    `search.levels`, settled inside their part.
    """
    space, (low, high) = prices.space, window
    shift = (rng.random() - 0.5) / n
    inner = [low + (high - low) * (k / n + shift) for k in range(1, n)]
    step = STEP * prices.cost(space.largest()) / max(1, len(space.genes) - 1)
    sizes = {sub: prices.cost(sub) for sub in best}
    chosen: dict[SubNetwork, None] = {}
    for part in pairwise((low, *inner, high)):
        middle = sum(part) / 2
        inside = [sub for sub in best if part[0] <= sizes[sub] <= part[1]]
        parents = inside or sorted(best, key=lambda sub: abs(sizes[sub] - middle))[:2]
        mutants: dict[SubNetwork, None] = {}
        for _ in range(OVERSAMPLE):
            levels, n_swaps = space.levels(rng.choice(parents)), rng.randint(*SWAPS)
            if rng.random() < CROSSED:
                other = space.levels(rng.choice(best))
                levels, n_swaps = tuple(rng.choice(pair) for pair in zip(levels, other, strict=True)), n_swaps - 1
            moved = mutate(prices, levels, part, rng, step=step, n_swaps=n_swaps, leap=0.1)
            if predict is None and rng.random() < UNGUIDED:  # no allocation knows about hidden channels, say
                random_one = fit(prices, space.sample(rng), part, rng)
                moved = None if random_one is None else space.levels(random_one)
            if moved is not None:
                mutants[space.build(moved)] = None
        new = [sub for sub in mutants if sub not in found and sub not in chosen]
        if new:
            chosen[new[0] if predict is None or rng.random() < UNGUIDED else min(new, key=predict)] = None
    return list(chosen) or _drawn(prices, window, best, found, n, rng)


def _neighbour(prices: Prices, sub: SubNetwork, window: Window, rng: random.Random) -> SubNetwork | None:
    """A network beside another: one gene a level up or down, or an equal-cost swap."""
    space = prices.space
    if rng.random() < 0.5:
        others = [s for s in space.neighbours(sub) if window[0] <= prices.cost(s) <= window[1]]
        return rng.choice(others) if others else None
    step = STEP * prices.cost(space.largest()) / max(1, len(space.genes) - 1)
    found = mutate(prices, space.levels(sub), window, rng, step=step, n_swaps=1, leap=0.1)
    return None if found is None else space.build(found)


def measured(subs: Sequence[SubNetwork], axes: Sequence[Measure]) -> list[Point]:
    """Networks on every axis."""
    values = [axis(subs) for axis in axes]
    return [Point(sub, tuple(map(float, row))) for sub, row in zip(subs, zip(*values, strict=True), strict=True)]


def sampler(method: str, batch: int, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name."""
    with _calm():
        if method == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=batch, seed=seed)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def guided(
    space: SearchSpace,
    axes: Sequence[Measure],
    cost: Cost,
    own: optuna.samplers.BaseSampler,
    *,
    window: Window | None = None,
    start: Sequence[SubNetwork] = (),
    n_trials: int = 200,
    batch: int = 20,
    seed: int = 0,
    tell: Tell | None = None,
) -> list[Point]:
    """Networks that a sampler of Optuna asks for, measured, in their order.

    window: costs that candidates are moved into (default: the whole space); the sampler is told what they were moved
    to. It sees levels (0 is the largest option) in a study in memory, fed in order, so that a resumed call repeats its
    choices exactly.
    """
    prices, rng = Prices(space, cost), random.Random(f"guided {seed}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    guide = optuna.create_study(directions=["minimize"] * len(axes), sampler=own)
    ranges: dict[str, BaseDistribution] = {g.name: IntDistribution(0, len(g.options) - 1) for g in space.genes}
    points: list[Point] = []

    def moved(sub: SubNetwork) -> SubNetwork:
        return sub if window is None else fit(prices, sub, window, rng) or scatter(prices, window, rng)

    with _calm():
        for sub in start:
            guide.enqueue_trial(_named(space, space.snap(moved(sub))))
        while len(points) < n_trials:
            asked = [guide.ask(ranges) for _ in range(min(batch, n_trials - len(points)))]
            wanted = [tuple(trial.params[gene.name] for gene in space.genes) for trial in asked]
            found = measured([moved(space.build(levels)) for levels in wanted], axes)
            for trial, levels, point in zip(asked, wanted, found, strict=True):
                _told(guide, trial, levels, space.levels(point.subnetwork), point.values, space, ranges)
            points += found
            if tell is not None:
                tell(f"{type(own).__name__} {len(points)}/{n_trials}")
    return points


def _named(space: SearchSpace, levels: Levels) -> dict[str, int]:
    return {gene.name: level for gene, level in zip(space.genes, levels, strict=True)}


def _told(
    guide: optuna.Study,
    trial: optuna.Trial,
    asked: Levels,
    levels: Levels,
    values: Sequence[float],
    space: SearchSpace,
    ranges: dict[str, BaseDistribution],
) -> None:
    """Tell the sampler what was measured: of the network that it asked for, or of the one that this was moved to."""
    if asked == levels:
        guide.tell(trial, list(values))
        return
    notes = guide.trials[trial.number].system_attrs  # its generation, for genetic samplers
    guide.tell(trial, state=TrialState.FAIL)
    true = optuna.trial.create_trial(
        values=list(values), params=_named(space, levels), distributions=ranges, system_attrs=notes
    )
    guide.add_trial(true)


@contextmanager
def _calm() -> Iterator[None]:
    """Without Optuna's warnings that an argument is new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def nsga2(
    space: SearchSpace,
    objective: Objective,
    cost: Cost,
    *,
    budget: Window | None = None,
    start: Sequence[SubNetwork] = (),
    n_trials: int = 200,
    population: int = 20,
    seed: int = 0,
    record: Record | None = None,
    draw: int = 0,
    rung: int = 0,
    sampler: optuna.samplers.BaseSampler | None = None,
    progress: Tell | None = None,
) -> list[Trial]:
    """Score and cost minimised together by Optuna's NSGA-II (or any other of its samplers); returns the front.

    budget: costs that candidates are moved into (default: the whole space). All are judged on one draw and rung,
    because dominance compares candidates of different generations; judge the front again on held-out tokens.
    """
    kept = record or Record.open(None, space, costs={"cost": cost})
    ledger = Ledger(kept, objective, "nsga2", budget)
    own = sampler or optuna.samplers.NSGAIISampler(population_size=population, seed=seed)

    def score(subs: Sequence[SubNetwork]) -> list[float]:
        return [judged.value for judged in ledger.judge(subs, draw, rung)]

    def price(subs: Sequence[SubNetwork]) -> list[float]:
        return [cost(sub) for sub in subs]

    points = guided(
        space, (score, price), cost, own, window=budget, start=start, n_trials=n_trials, batch=population, seed=seed,
        tell=progress,
    )  # fmt: skip
    mine = {point.subnetwork.key() for point in points}
    judged = [t for t in kept.trials() if t.draw == draw and t.rung == rung and t.subnetwork.key() in mine]
    return front(judged, lambda t: (t.value, float(cost(t.subnetwork))))


def front(items: Iterable[T], values: Callable[[T], tuple[float, ...]]) -> list[T]:
    """The items that no other one dominates (all values lower or equal, one lower), cheapest last value first.

    Of items with equal values the first one stays. A law: the order of the result does not depend on their order.
    """
    best: dict[tuple[float, ...], T] = {}
    for item in items:
        best.setdefault(tuple(values(item)), item)
    points = sorted(best, key=lambda v: v[::-1])
    if points and len(points[0]) == 2:
        kept, least = [], math.inf
        for point in points:
            if point[0] < least:
                kept.append(point)
                least = point[0]
    else:
        kept = [p for p in points if not any(_dominates(q, p) for q in points)]
    return [best[point] for point in kept]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def hypervolume(points: Iterable[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    """The volume between the points and a reference that is worse than all of them in every value.

    Sliced along the last value: between two neighbouring ones, what all points up to there cover in the others.
    """
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if len(reference) == 1:
        return max((reference[0] - p[0] for p in inside), default=0.0)
    inside.sort(key=lambda p: p[-1])
    total = 0.0
    for k, point in enumerate(inside):
        upper = inside[k + 1][-1] if k + 1 < len(inside) else reference[-1]
        if upper > point[-1]:
            total += (upper - point[-1]) * hypervolume([p[:-1] for p in inside[: k + 1]], reference[:-1])
    return total


__all__ = ["Measure", "Method", "Point", "explore", "front", "guided", "hypervolume", "measured", "nsga2", "sampler"]
