"""Floor 3: the search for good sub-networks under a budget: level-switch evolution, its random control, and fronts.

Every function here is deterministic in its seed and in the scores it is given, so a killed search resumes by being
called again on the same record (`study.py`). Shen's evolution is in `shen.py`, the knapsack in `allocate.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution

from prunus.searching.moves import Predict, Prices, Window, fit, mutate, scatter
from prunus.searching.space import Cost, SearchSpace
from prunus.searching.study import Judged, Ledger, Objective, Record, Tell, Trial
from prunus.subnetwork import SubNetwork

Propose = Callable[[SubNetwork, random.Random, float], SubNetwork | None]  # parent, rng, step -> candidate
T = TypeVar("T")


@dataclass(frozen=True)
class LevelSettings:
    """How level-switch evolution goes about it; the rungs are 0 .. len(survivors)."""

    generations: int = 40
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 1)  # how many offspring climb from each rung to the next
    swaps: tuple[int, int] = (1, 3)  # equal-cost swaps in one mutation, at least and at most
    step: float = 0.5  # greatest change of one sub-block at the start, in shares of an average whole sub-block
    leap: float = 0.1  # probability of a change of any size instead
    oversample: int = 4  # mutants proposed for each that is evaluated, where a prediction can choose among them
    explore: float = 0.25  # share of the offspring taken at random, whatever the prediction says
    drop_z: float = 2.0  # a candidate is dropped when it is worse by this many standard errors of paired windows
    accept_z: float = 0.5  # a new parent must be better on held-out tokens by this many standard errors
    patience: int = 12  # generations without a new parent before the search ends
    n_tokens: int | None = None  # forward tokens to spend at most


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    subnetwork: SubNetwork
    score: Judged  # on the last held-out draw, highest rung
    start: SubNetwork  # the first parent, judged on the same tokens
    start_score: Judged
    n_tokens: int  # forward tokens of everything the search asked for, also where the record had it already
    n_evaluations: int
    generations: int
    accepted: tuple[int, ...]  # generations that brought a new parent


def levels(
    space: SearchSpace,
    objective: Objective,
    cost: Cost,
    budget: Window,
    *,
    start: Sequence[SubNetwork] = (),
    seed: int = 0,
    record: Record | None = None,
    predict: Predict | None = None,
    settings: LevelSettings | None = None,
    progress: Tell | None = None,
) -> Found:
    """Level-switch evolution: equal-cost swaps, judged on fresh tokens every generation, accepted on held-out tokens.

    budget: the costs (lo, hi) that every candidate meets. start: sub-networks to begin with, e.g. of `allocate`, or
        results of neighbouring budgets (moved into the window); without any, a random one.
    predict: a cheap guess of the score; it chooses which mutants are worth evaluating, never which one wins.
    Objective calls: draw g >= 0 in generation g (parent and offspring on the same tokens), draws -1, -2, ... for
    acceptance. The first parent is returned unless the last one is better than it on a held-out draw of its own.
    After EvoPress (Sieberling et al. 2024, arXiv:2410.14649) and Tyr-the-Pruner (2025, arXiv:2503.09657).
    """
    chosen = settings or LevelSettings()
    prices = Prices(space, cost)
    mean_block = cost(space.largest()) / max(1, len(space.genes) - 1)

    def propose(parent: SubNetwork, rng: random.Random, step: float) -> SubNetwork | None:
        n_swaps = rng.randint(*chosen.swaps)
        found = mutate(
            prices, space.levels(parent), budget, rng, step=step * mean_block, n_swaps=n_swaps, leap=chosen.leap
        )
        return None if found is None else space.build(found)

    ledger = Ledger(record or Record.open(None, space), objective, "levels", budget)
    rng = random.Random(f"levels {seed}")
    starts = [sub for sub in (fit(prices, s, budget, rng) for s in start) if sub is not None]
    starts = starts or [scatter(prices, budget, rng)]
    return _run(ledger, starts, propose, predict, chosen, rng, progress)


def random_search(
    space: SearchSpace,
    objective: Objective,
    cost: Cost,
    budget: Window,
    *,
    seed: int = 0,
    record: Record | None = None,
    settings: LevelSettings | None = None,
    progress: Tell | None = None,
) -> Found:
    """The control: the same rungs, draws, acceptance and token budget as `levels`, but every candidate is random."""
    prices = Prices(space, cost)

    def propose(parent: SubNetwork, rng: random.Random, step: float) -> SubNetwork | None:
        return scatter(prices, budget, rng)

    chosen = settings or LevelSettings()
    ledger = Ledger(record or Record.open(None, space), objective, "random", budget)
    rng = random.Random(f"random {seed}")
    chosen = replace(chosen, patience=chosen.generations)
    return _run(ledger, [scatter(prices, budget, rng)], propose, None, chosen, rng, progress)


def _run(
    ledger: Ledger,
    starts: list[SubNetwork],
    propose: Propose,
    predict: Predict | None,
    s: LevelSettings,
    rng: random.Random,
    progress: Tell | None,
) -> Found:
    top, step, since, accepted = len(s.survivors), s.step, 0, list[int]()
    first = parent = _start(starts, ledger.judge(starts, -1, top), s.accept_z)
    seen, generation = set(starts), 0
    while generation < s.generations and since < s.patience and _affordable(ledger, s, top):
        subs = _offspring(parent, propose, predict, s, rng, step, seen)
        if not subs:
            break
        seen.update(subs)
        winner = _halve(ledger, parent, subs, generation, s)
        if winner is not None:
            mine, theirs = ledger.judge([winner, parent], -generation - 2, top)
            if not _better(mine, theirs, s.accept_z):
                winner = None
        since = 0 if winner is not None else since + 1
        if winner is not None:
            parent = winner
            accepted.append(generation)
        # the 1/5 rule: as many steps up as down when one generation in three succeeds
        step = min(2.0, max(0.02, step * (1.3 if winner is not None else 0.88)))
        if progress is not None:
            share = f"{ledger.n_tokens / 1e6:.2f} M tokens"
            progress(f"{ledger.method} {generation + 1}/{s.generations}: {len(accepted)} accepted, {share}")
        generation += 1
    last = -s.generations - 2  # tokens that decided nothing so far
    score, first_score = ledger.judge([parent, first], last, top)
    if not _better(score, first_score, 0.0):
        parent, score = first, first_score
    n = (ledger.n_tokens, ledger.n_evaluations, generation)
    return Found(parent, score, first, first_score, *n, tuple(accepted))


def _affordable(ledger: Ledger, s: LevelSettings, top: int) -> bool:
    """True if the token budget holds one more generation at its dearest, and the last comparison."""
    if s.n_tokens is None:
        return True
    tokens = ledger.objective.n_tokens
    climbing = (s.offspring, *s.survivors)
    need = sum((n + 1) * tokens(rung) for rung, n in enumerate(climbing)) + 4 * tokens(top)
    return ledger.n_tokens + need <= s.n_tokens


def _offspring(
    parent: SubNetwork,
    propose: Propose,
    predict: Predict | None,
    s: LevelSettings,
    rng: random.Random,
    step: float,
    seen: set[SubNetwork],
) -> list[SubNetwork]:
    """New candidates, most of them those of the best prediction."""
    wanted = s.offspring * (s.oversample if predict is not None else 1)
    found: dict[SubNetwork, None] = {}  # a set that keeps its order
    for _ in range(4 * wanted):
        sub = propose(parent, rng, step)
        if sub is not None and sub not in seen:
            found[sub] = None
        if len(found) == wanted:
            break
    subs = list(found)
    if predict is None:
        return subs
    n_chosen = round(s.offspring * (1 - s.explore))
    ranked = sorted(subs, key=predict)
    rest = ranked[n_chosen:]
    return ranked[:n_chosen] + rng.sample(rest, min(len(rest), s.offspring - n_chosen))


def _halve(
    ledger: Ledger, parent: SubNetwork, subs: list[SubNetwork], draw: int, s: LevelSettings
) -> SubNetwork | None:
    """Successive halving over rungs, racing on paired windows; the winner if it beats the parent, else None."""
    for rung in range(len(s.survivors) + 1):
        scores = ledger.judge([parent, *subs], draw, rung)
        ours, pairs = scores[0], sorted(zip(scores[1:], subs, strict=True), key=lambda pair: pair[0].value)
        bar = min(ours, pairs[0][0], key=lambda score: score.value)
        alive = [(score, sub) for score, sub in pairs if not _worse(score, bar, s.drop_z)]
        n_left = s.survivors[rung] if rung < len(s.survivors) else 1
        subs = [sub for _, sub in alive[:n_left]]
        if not subs:
            return None
        if rung == len(s.survivors):
            return subs[0] if pairs[0][0].value < ours.value else None
    raise AssertionError("unreachable")


def _paired(a: Judged, b: Judged) -> tuple[float, float]:
    """Mean difference a - b and its standard error (0 without windows)."""
    n = len(a.windows)
    if n < 2 or n != len(b.windows) or not all(map(math.isfinite, (*a.windows, *b.windows))):
        return (0.0 if a.value == b.value else a.value - b.value), 0.0
    differences = [x - y for x, y in zip(a.windows, b.windows, strict=True)]
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean, math.sqrt(variance / n)


def _better(a: Judged, b: Judged, z: float) -> bool:
    mean, error = _paired(a, b)
    return mean < -z * error if error else mean < 0


def _worse(a: Judged, b: Judged, z: float) -> bool:
    """True if a is surely worse than b; without windows nothing is sure."""
    mean, error = _paired(a, b)
    return bool(error) and mean > z * error


def _start(starts: Sequence[SubNetwork], scores: Sequence[Judged], z: float) -> SubNetwork:
    """The first start, the knapsack's, unless another one is better by more than the noise of a few windows."""
    best, own = starts[0], scores[0]
    for sub, score in zip(starts[1:], scores[1:], strict=True):
        if _better(score, own, max(z, 1.0)):
            best, own = sub, score
    return best


# -------------------------------------------------------------------------------------------------- fronts


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
    The sampler sees levels (0 is the largest option) in a study in memory, fed in order, so a resumed call repeats its
    choices exactly.
    """
    prices, rng = Prices(space, cost), random.Random(f"nsga2 {seed}")
    kept = record or Record.open(None, space, costs={"cost": cost})
    ledger = Ledger(kept, objective, "nsga2", budget)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    guide = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=sampler or optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
    )
    genes, asked = space.genes, list[SubNetwork]()
    ranges: dict[str, BaseDistribution] = {gene.name: IntDistribution(0, len(gene.options) - 1) for gene in genes}
    for sub in start:
        guide.enqueue_trial({gene.name: level for gene, level in zip(genes, space.snap(sub), strict=True)})
    for n in range(n_trials):
        trial = guide.ask(ranges)
        sub = space.build([trial.params[gene.name] for gene in genes])
        if budget is not None:
            sub = fit(prices, sub, budget, rng) or scatter(prices, budget, rng)
        [score] = ledger.judge([sub], draw, rung)
        asked.append(sub)
        guide.tell(trial, [score.value, float(cost(sub))])
        if progress is not None and (n + 1) % population == 0:
            progress(f"nsga2 {n + 1}/{n_trials}: {ledger.n_tokens / 1e6:.2f} M tokens")
    mine = {sub.key() for sub in asked}
    own = [t for t in kept.trials() if t.draw == draw and t.rung == rung and t.subnetwork.key() in mine]
    return front(own, lambda t: (t.value, float(cost(t.subnetwork))))


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


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area between the points and a reference point that is worse than all of them in both values."""
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    steps = [*front(inside, lambda p: p), (-math.inf, reference[1])]  # ascending second value, descending first
    return sum((reference[0] - a[0]) * (b[1] - a[1]) for a, b in pairwise(steps))


__all__ = ["Found", "LevelSettings", "front", "hypervolume", "levels", "nsga2", "random_search"]
