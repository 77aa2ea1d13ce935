"""Floor 5: the step `search`: a sub-network for every target, from the knapsack's start to the search's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunus.reforming import sensitivity
from prunus.searching import search, shen
from prunus.searching.allocate import allocate
from prunus.searching.space import Cost
from prunus.searching.study import Record
from prunus.steps import RUNGS, Prepared, Session, slack
from prunus.subnetwork import SubNetwork
from prunus.targets import TIMES, Target

BELIEFS = (1.0, 0.5, 0.0)  # in the measured levels: gentle budgets gain by them, hard ones lose
ATTEMPTS = 4  # of the knapsack, where costs do not quite add up


def search_one(s: Session, p: Prepared, target: Target, starts: Sequence[SubNetwork]) -> SubNetwork:
    """The sub-network for one target; starts: networks of other targets, which the search may begin from."""

    def compute() -> dict[str, Any]:
        keep = s.share(target)
        low, high = p.space.window(s.cost, keep, of=s.cost(s.whole), slack=slack(s))
        openings = allocated(s, p, high)
        seeds = [*openings, *starts]
        window = min(low, *(s.cost(sub) for sub in seeds[:1])), high  # coarse spaces may not come nearer
        record = open_record(s, p)
        before = p.objective.forward_tokens
        found = _run_method(s, p, target, window, openings, seeds, record)
        s.run.count_tokens(int(p.objective.forward_tokens - before))
        return {
            "keep": keep,
            "subnetwork": found.subnetwork.to_json(),
            "predicted_nats": sensitivity.predict(p.curves, found.subnetwork),
            "nats": found.score.value,
            "start_nats": found.start_score.value,
            "start": found.start.to_json(),
            "belief": openings.get(found.start),
            "evaluations": found.n_evaluations,
            "generations": found.generations,
            "asked_tokens": found.n_tokens,
        }

    inputs = {"errors": s.run.sha256("errors.safetensors"), "starts": [sub.key() for sub in starts]}
    inputs |= {"latency": s.run.sha256("latency.json")} if s.config.constraint in TIMES else {}
    found = s.run.do("search", f"search/{target.name}.json", compute, inputs=inputs)
    return SubNetwork.from_json(found["subnetwork"])


def open_record(s: Session, p: Prepared, objective: str = "") -> Record:
    """An Optuna study, with the memory of every candidate that was judged: in the run, or in a shared storage.

    objective: the name of what is minimised (default: what the targets are searched by).
    """
    c = s.config.search
    belongs_to = {"model": str(s.run.source.get("sha256")), "tokens": str(s.run.notes.get("token_hash"))}
    if c.storage:  # a run's own record goes when an earlier step is done again; a shared one must know what it is of
        reform = s.config.reform
        belongs_to["levels"] = s.run.sha256("errors.safetensors")[:16]
        belongs_to["settings"] = f"{reform.method} {reform.iterations}, windows {RUNGS}, seed {s.config.seed}"
    return Record.open(
        c.storage or s.run.grow("search", "trials.journal"),
        p.space,
        objective=objective or f"{p.objective.kind}_nats",
        costs={s.config.constraint: s.cost},
        belongs_to=belongs_to,
        n_workers=c.workers,
        study=c.study,
    )


def _run_method(
    s: Session,
    p: Prepared,
    target: Target,
    window: tuple[float, float],
    openings: Mapping[SubNetwork, float],
    seeds: Sequence[SubNetwork],
    record: Record,
) -> search.Found:
    """The search that the configuration names."""
    c, seed = s.config.search, s.config.seed
    settings = search.LevelSettings(generations=c.generations, offspring=c.offspring)
    fixed: Any = {"start": seeds, "rung": len(RUNGS) - 1, "seed": seed, "record": record}
    with s.progress(f"search for {target.name}", c.generations) as advance:

        def tick(_: str) -> None:
            advance(1)

        if c.method == "levels":
            return search.levels(
                p.space, p.objective, s.cost, window, start=seeds, seed=seed, record=record, settings=settings,
                predict=_prediction(p, openings), progress=tick,
            )  # fmt: skip
        if c.method == "random":
            return search.random_search(
                p.space, p.objective, s.cost, window, seed=seed, record=record, settings=settings, progress=tick
            )
        if c.method == "shen":
            published = shen.ShenSettings.sized(c.population, c.generations)
            return shen.shen(
                p.space, p.objective, s.cost, window, target=s.share(target), seed=seed, record=record,
                settings=published, progress=tick,
            )  # fmt: skip
        if c.method == "local":
            nearby = search.LocalSettings(generations=c.generations, neighbours=c.offspring)
            return search.local(p.space, p.objective, s.cost, window, settings=nearby, progress=tick, **fixed)
        return search.sampled(
            p.space, p.objective, s.cost, window, c.method, generations=c.generations, population=c.offspring,
            progress=tick, **fixed,
        )  # fmt: skip


def allocated(
    s: Session, p: Prepared, budget: float, beliefs: Sequence[float] = BELIEFS, cost: Cost | None = None
) -> dict[SubNetwork, float]:
    """The allocations that the curves call best within a budget, and the belief in the measured levels behind each.

    cost: what the budget limits; by default what the targets limit.
    """
    found: dict[SubNetwork, float] = {}
    own = cost or s.cost
    if p.space.uniform:
        return dict.fromkeys(_allocated_uniform(p, own, budget), 1.0)
    rest = own(s.whole) - sum(curve.costs[0] for curve in p.curves)
    if cost is None and s.config.constraint.startswith("parameters"):
        price = [curve.costs for curve in p.curves]
    else:  # price every level by what it saves when taken alone
        rest = 0.0
        whole = own(s.whole)
        price = [
            tuple(
                whole / len(p.curves) - whole + own(sensitivity.with_level(s.whole, c.layer, level))
                for level in c.levels
            )
            for c in p.curves
        ]
    for belief in beliefs if p.factors else beliefs[:1]:
        found.setdefault(_within(s, own, p.believed(belief), price, budget, rest), belief)
    return found


def _within(
    s: Session,
    cost: Cost,
    curves: Sequence[sensitivity.Curve],
    price: Sequence[Sequence[float]],
    budget: float,
    rest: float,
) -> SubNetwork:
    """The knapsack's answer; where prices of single levels do not quite add up (a layer that goes whole saves its
    frame too), it is asked again with what the true cost left over."""
    asked, least = budget - rest, sum(min(one) for one in price)
    best: SubNetwork | None = None
    for _ in range(ATTEMPTS):
        found = allocate(price, [curve.nats for curve in curves], max(asked, least))
        sub = sensitivity.subnetwork_of(curves, found.levels, s.whole.hidden)
        spare = budget - cost(sub)
        fits = spare >= -1e-12 * budget
        if fits and (best is None or sensitivity.predict(curves, sub) < sensitivity.predict(curves, best)):
            best = sub
        if fits and spare <= slack(s) * budget:
            break
        asked += spare
    return best or sub


def _prediction(
    p: Prepared, openings: Mapping[SubNetwork, float]
) -> Callable[[SubNetwork], Callable[[SubNetwork], float]] | None:
    """The curves' guess of a divergence, those that a search's start came from; none where hidden channels may go,
    which the curves know nothing about."""
    if len(p.space.hidden) > 1:
        return None

    def guess(start: SubNetwork) -> Callable[[SubNetwork], float]:
        curves = p.believed(openings.get(start, 1.0))
        return lambda sub: sensitivity.predict(curves, sub)

    return guess


def _allocated_uniform(p: Prepared, cost: Cost, budget: float) -> list[SubNetwork]:
    """The best few uniform networks by prediction, for every head count and depth the widest MLP that fits."""
    attention, widths, depths, hidden = p.space.genes
    found: list[SubNetwork] = []
    for h in range(len(hidden.options)):
        for a in range(len(attention.options)):
            for d in range(len(depths.options)):
                fitting = (p.space.build((a, w, d, h)) for w in range(len(widths.options)))
                best = next((sub for sub in fitting if cost(sub) <= budget), None)
                if best is not None:
                    found.append(best)
        if found:  # the curves know nothing about hidden channels, so the fewest go
            break
    found.sort(key=lambda sub: sensitivity.predict(p.curves, sub))
    return found[:8]
