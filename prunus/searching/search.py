"""Floor 3: the search for good sub-networks under a budget: level-switch evolution, its random control, and others.

Every function here is deterministic in its seed and in the scores it is given, so a killed search resumes by being
called again on the same record (`study.py`). Shen's evolution is in `shen.py`, the knapsack in `allocate.py`, searches
over all sizes at once in `pareto.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prunus.searching.moves import Predict, Prices, Window, fit, mutate, scatter
from prunus.searching.pareto import guided, sampler
from prunus.searching.space import Cost, SearchSpace
from prunus.searching.study import Judged, Ledger, Objective, Record, Tell
from prunus.subnetwork import SubNetwork

Propose = Callable[[SubNetwork, random.Random, float], SubNetwork | None]  # parent, rng, step -> candidate


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
    predict: Callable[[SubNetwork], Predict] | None = None,
    settings: LevelSettings | None = None,
    progress: Tell | None = None,
) -> Found:
    """Level-switch evolution: equal-cost swaps, judged on fresh tokens every generation, accepted on held-out tokens.

    budget: the costs (lo, hi) that every candidate meets. start: sub-networks to begin with, e.g. of `allocate`, or
        results of neighbouring budgets (moved into the window); without any, a random one.
    predict: from the start that the search begins with, a cheap guess of the score; it chooses which mutants are worth
        evaluating, never which one wins.
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
    predict: Callable[[SubNetwork], Predict] | None,
    s: LevelSettings,
    rng: random.Random,
    progress: Tell | None,
) -> Found:
    top, step, since, accepted = len(s.survivors), s.step, 0, list[int]()
    first = parent = _start(starts, ledger.judge(starts, -1, top), s.accept_z)
    guess = None if predict is None else predict(first)
    seen, generation = set(starts), 0
    while generation < s.generations and since < s.patience and _affordable(ledger, s, top):
        subs = _offspring(parent, propose, guess, s, rng, step, seen)
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


# ------------------------------------------------------------------------------------------- on one set of tokens


@dataclass(frozen=True)
class LocalSettings:
    """How the local search goes about it."""

    generations: int = 40
    neighbours: int = 16  # judged together, so that several processes can share them
    patience: int = 3  # generations without a better neighbour before it starts anew
    kick: tuple[int, int] = (3, 6)  # swaps from the best network to a new start
    step: float = 0.5  # greatest change of one sub-block, in shares of an average whole sub-block
    leap: float = 0.1  # probability of a change of any size instead
    accept_z: float = 0.5  # standard errors by which a neighbour must be better


def local(
    space: SearchSpace,
    objective: Objective,
    cost: Cost,
    budget: Window,
    *,
    start: Sequence[SubNetwork] = (),
    rung: int = 0,
    seed: int = 0,
    record: Record | None = None,
    settings: LocalSettings | None = None,
    progress: Tell | None = None,
) -> Found:
    """Local search: the best neighbour by one equal-cost swap, as long as it is better; then from another start.

    start: as for `levels`; the first is the allocation's, the others are later starts, and when they are used up, the
    best network after a few random swaps. All are judged on draw 0 of one rung, because starts are compared with each
    other; the first start is returned unless the best is better than it on a held-out draw.
    """
    s = settings or LocalSettings()
    prices, rng = Prices(space, cost), random.Random(f"local {seed}")
    ledger = Ledger(record or Record.open(None, space), objective, "local", budget)
    starts = [sub for sub in (fit(prices, one, budget, rng) for one in start) if sub is not None]
    first, *waiting = starts or [scatter(prices, budget, rng)]
    step = s.step * cost(space.largest()) / max(1, len(space.genes) - 1)

    def moved(sub: SubNetwork, n_swaps: int) -> SubNetwork | None:
        found = mutate(prices, space.levels(sub), budget, rng, step=step, n_swaps=n_swaps, leap=s.leap)
        return None if found is None else space.build(found)

    [score] = ledger.judge([first], 0, rung)
    here, best, since, accepted = (first, score), (first, score), 0, list[int]()
    for generation in range(s.generations):
        if since == s.patience:
            new = waiting.pop(0) if waiting else moved(best[0], rng.randint(*s.kick)) or best[0]
            here, since = (new, ledger.judge([new], 0, rung)[0]), 0
        mutants = dict.fromkeys(moved(here[0], 1) for _ in range(2 * s.neighbours))
        subs = [sub for sub in mutants if sub is not None][: s.neighbours]
        pairs = zip(subs, ledger.judge(subs, 0, rung), strict=True)
        nearest = min(pairs, key=lambda pair: pair[1].value, default=here)
        better = _better(nearest[1], here[1], s.accept_z)
        here, since = (nearest, 0) if better else (here, since + 1)
        if _better(here[1], best[1], 0.0):
            best = here
            accepted.append(generation)
        if progress is not None:
            progress(f"local {generation + 1}/{s.generations}: {ledger.n_tokens / 1e6:.2f} M tokens")
    return _ended(ledger, best[0], first, rung, s.generations, accepted)


def sampled(
    space: SearchSpace,
    objective: Objective,
    cost: Cost,
    budget: Window,
    method: Literal["nsga2", "tpe"],
    *,
    start: Sequence[SubNetwork] = (),
    generations: int = 10,
    population: int = 16,
    rung: int = 0,
    seed: int = 0,
    record: Record | None = None,
    progress: Tell | None = None,
) -> Found:
    """A sampler of Optuna inside one budget: TPE minimises the score, NSGA-II the score and the cost together.

    All candidates are judged on draw 0 of one rung, `population` of them at a time; the first start is returned unless
    the best is better than it on a held-out draw.
    """
    ledger = Ledger(record or Record.open(None, space), objective, method, budget)

    def score(subs: Sequence[SubNetwork]) -> list[float]:
        return [judged.value for judged in ledger.judge(subs, 0, rung)]

    def price(subs: Sequence[SubNetwork]) -> list[float]:
        return [cost(sub) for sub in subs]

    points = guided(
        space, (score,) if method == "tpe" else (score, price), cost, sampler(method, population, seed), window=budget,
        start=start, n_trials=max(1, generations * population), batch=population, seed=seed, tell=progress,
    )  # fmt: skip
    best = min(points, key=lambda point: point.values[0])
    first = points[0].subnetwork  # the first start, moved into the budget
    return _ended(ledger, best.subnetwork, first, rung, generations, ())


def _ended(
    ledger: Ledger, best: SubNetwork, first: SubNetwork, rung: int, generations: int, accepted: Sequence[int]
) -> Found:
    """The best or, if that is not better on held-out tokens, the first."""
    score, first_score = ledger.judge([best, first], -1, rung)
    if not _better(score, first_score, 0.0):
        best, score = first, first_score
    n = (ledger.n_tokens, ledger.n_evaluations, generations)
    return Found(best, score, first, first_score, *n, tuple(accepted))


__all__ = ["Found", "LevelSettings", "LocalSettings", "levels", "local", "random_search", "sampled"]
