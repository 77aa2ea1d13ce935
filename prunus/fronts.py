"""Floor 5: the step `front`: networks of all sizes, of which none is better than another in everything that counts.

What a search for a front finds, and a random search with as many evaluations, both judged again on what neither saw.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunus.choosing import BELIEFS, allocated, open_record
from prunus.errors import UserError
from prunus.models import costs
from prunus.models.slicing import activate
from prunus.recording.artefact import digest, fingerprint, load_json
from prunus.recording.run import Run
from prunus.reforming import sensitivity
from prunus.searching import pareto
from prunus.searching.moves import Window
from prunus.searching.objective import IGNORED, Divergence
from prunus.searching.options import MEASURED, TITLES
from prunus.searching.space import Cost
from prunus.searching.study import Judged, Ledger, Objective
from prunus.steps import WINDOW, Prepared, Session, slack, timetable_of, widest_space
from prunus.subnetwork import SubNetwork
from prunus.targets import TIMES
from prunus.tasks import asked_for, evaluate_tasks, manager_of, refuse_few
from prunus.timing import runtimes
from prunus.training import supernet

FILE = "search/front.json"
SEARCHED = 1  # the rung that candidates are judged on; the front is judged on held-out windows of the highest one
STARTS = 2  # one of so many evaluations is an allocation
BEYOND = 0.1  # how far behind the worst of all fronts the reference of a hypervolume lies, in shares of their span
Held = tuple[float, float | None]  # a value, and its standard error where it has one


@dataclass(frozen=True)
class Axis:
    """One thing that a front minimises: while it is searched, and afterwards on what the search did not see."""

    name: str
    search: pareto.Measure
    held: Callable[[Sequence[SubNetwork]], list[Held]]


def check(s: Session) -> None:
    """Raise UserError for a front that cannot be searched, before any long work."""
    c = s.config.front
    if not c.objectives:
        return
    space = widest_space(s)
    try:
        space.window(s.cost, c.least, of=s.cost(s.whole))
    except UserError as error:
        raise UserError(f"front.least (--front-least) is {c.least:g}: {error}") from None
    if "loss" in c.objectives and (not s.config.train.data or s.config.train.holdout < 2):
        raise UserError(
            "front.objectives names loss, which is taken on the windows of --train that are not trained on; this run "
            "has no training data, or train.holdout is below 2. Give both, or take perplexity"
        )
    if "accuracy" in c.objectives:
        manager_of(asked_for(c.tasks), c.tasks_path)
    if "latency" in c.objectives and len(space.hidden) > 1:
        raise UserError(
            "front.objectives names latency, times are measured at the model's own hidden size, and the space of the "
            f"training has {len(space.hidden)}; leave --search-space trained out, or take flops or bytes"
        )
    if "latency" in c.objectives and s.config.constraint not in TIMES:
        runtimes.check(s.model, s.family, s.config.budget, space)


def prepare(s: Session) -> None:
    """What a front would otherwise stumble over at the end of a run: a table of times that cannot be measured, tasks
    that have no examples left to judge the front by."""
    c = s.config.front
    if "latency" in c.objectives:
        timetable_of(s)
    if "accuracy" in c.objectives:
        refuse_few(asked_for(c.tasks), c.tasks_path, c.task_limit)


def search_front(s: Session, p: Prepared, chosen: Mapping[str, SubNetwork]) -> dict[str, Any]:
    """The front that the configuration asks for, and its random-search control, as plain data: RUN/search/front.json.

    chosen: the networks of the targets; the search begins from them and from allocations of sizes between them.
    """
    c = s.config.front

    def compute() -> dict[str, Any]:
        computed = {name: _cost(s, name) for name in c.objectives if name not in MEASURED}
        axes = [_axis(s, p, name, computed) for name in c.objectives]
        sizes = [(cost, _window(s, p, cost)) for cost in computed.values() or [s.cost]]
        starts = [*chosen.values(), *_starts(s, p, sizes, c.evaluations // STARTS - len(chosen))]
        sides: dict[str, Any] = {}
        methods: dict[str, pareto.Method] = {"searched": c.method, "control": "random"}
        with s.progress(f"front of {', '.join(c.objectives)}", 2 * c.evaluations) as advance:
            for side, method in methods.items():
                points = pareto.explore(
                    p.space, [axis.search for axis in axes], sizes[0][0], method, sizes[0][1], others=sizes[1:],
                    start=starts, predict=_guess(p), n_trials=c.evaluations, batch=c.population, seed=s.config.seed,
                    tell=lambda _: advance(c.population),
                )  # fmt: skip
                sides[side] = _side(s, axes, points)
        best = {side: [list(point["values"].values()) for point in found["front"]] for side, found in sides.items()}
        for side, share in volumes(best).items():
            sides[side]["hypervolume"] = share
        dense = [axis.held([s.whole])[0] for axis in axes]
        trained = {"kl": "KL to the trained full network (nats per token)"} if s.tier else {}
        found = {
            "objectives": list(c.objectives),
            "titles": [trained.get(name, TITLES[name]) for name in c.objectives],
            "method": c.method,
            "evaluations": c.evaluations,
            "dense": [value for value, _ in dense],
            "dense_errors": [error for _, error in dense],
            **sides,
        }
        return numbered(found)

    return numbered(s.run.do("front", FILE, compute, inputs={"errors": s.run.sha256("errors.safetensors")}))


def _window(s: Session, p: Prepared, cost: Cost) -> Window:
    """The costs of a front's networks: down to `front.least` of the dense model's, or as near as the space comes."""
    whole = cost(s.whole)
    return max(s.config.front.least * whole, p.space.reach(cost)[0]), (1 - slack(s)) * whole  # not the dense model


def _starts(s: Session, p: Prepared, sizes: Sequence[tuple[Cost, Window]], n: int) -> dict[SubNetwork, None]:
    """Allocations of evenly spread sizes, by every cost, with every belief in the measured levels: n or a few more."""
    found: dict[SubNetwork, None] = {}
    beliefs = BELIEFS if p.factors and not p.space.uniform else BELIEFS[:1]
    each = max(3, n // (len(sizes) * len(beliefs)))
    for cost, (low, high) in sizes:
        for k in range(each):
            budget = low + (high - low) * (k + 0.5) / each
            some = allocated(s, p, budget, beliefs, None if cost == s.cost else cost)
            found |= dict.fromkeys(list(some)[: len(beliefs)])
    return found


def _guess(p: Prepared) -> Callable[[SubNetwork], float] | None:
    """The curves' guess of a divergence; none where hidden channels may go, which they know nothing about."""
    if len(p.space.hidden) > 1:
        return None
    curves = p.believed(0.5)
    return lambda sub: sensitivity.predict(curves, sub)


def numbered(found: Mapping[str, Any]) -> dict[str, Any]:
    """A front whose points know their numbers, from 1, by which a person picks one; older runs did not write them."""
    own = found["searched"]
    rows = [{"point": number, **row} for number, row in enumerate(own["front"], 1)]
    return {**found, "searched": {**own, "front": rows}}


def point(run: Run, number: int) -> dict[str, Any]:
    """One point of a run's front: its row in RUN/search/front.json, with the dense model's (value, error) under
    "dense".

    Raises UserError where the run has no finished front, naming the command that makes it, or no such point.
    """
    where, asked = str(run.directory), run.config["front"]["objectives"]
    command = shlex.join(["prunus", "search", where])
    if not run.done(FILE, {"errors": run.sha256("errors.safetensors")}):
        if not asked:
            raise UserError(f"{where!r} has no front of several objectives; search one: {command} --front kl,bytes")
        raise UserError(
            f"{where!r} has not finished its front of {', '.join(asked)} ({FILE} is missing or damaged); do that "
            f"first: {command}"
        )
    found = numbered(load_json(run.path(FILE)))
    rows = found["searched"]["front"]
    if not rows:
        raise UserError(f"the front of {where!r} has no point: no network that was judged again has finite values")
    if not 1 <= number <= len(rows):
        span = f"points 1 to {len(rows)}" if len(rows) > 1 else "one point, 1"
        raise UserError(f"the front of {where!r} has {span} (`{command}` lists them); given {number}")
    errors = found.get("dense_errors", [None] * len(found["dense"]))  # older fronts do not say
    dense = dict(zip(found["objectives"], zip(found["dense"], errors, strict=True), strict=True))
    return {**rows[number - 1], "dense": dense}


def volumes(fronts: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """What each front dominates, as a share of a box: on every axis from the best of all fronts to the worst of all
    and a tenth of the way beyond, so that the ends of a front count too.
    """
    rows = [row for front in fronts.values() for row in front]
    if not rows:
        return dict.fromkeys(fronts, 0.0)
    low, high = [min(column) for column in zip(*rows, strict=True)], [max(column) for column in zip(*rows, strict=True)]
    span = [b - a or 1.0 for a, b in zip(low, high, strict=True)]

    def scaled(row: Sequence[float]) -> tuple[float, ...]:
        return tuple((x - a) / w for x, a, w in zip(row, low, span, strict=True))

    corner = (1 + BEYOND,) * len(low)
    whole = (1 + BEYOND) ** len(low)
    return {name: pareto.hypervolume(map(scaled, front), corner) / whole for name, front in fronts.items()}


def _side(s: Session, axes: Sequence[Axis], points: Sequence[pareto.Point]) -> dict[str, Any]:
    """All that one search has tried, and its front: chosen by the search's values, then by those on held-out text."""
    finite = [point for point in points if all(map(math.isfinite, point.values))]
    best = pareto.front(finite, lambda point: point.values)
    subs = [point.subnetwork for point in best]
    held = list(zip(*(axis.held(subs) for axis in axes), strict=True))
    names = [axis.name for axis in axes]
    rows: list[dict[str, Any]] = [
        {
            "values": {name: value for name, (value, _) in zip(names, row, strict=True)},
            "errors": {name: error for name, (_, error) in zip(names, row, strict=True)},
            "search_values": dict(zip(names, point.values, strict=True)),
            "parameters": costs.parameters(s.layout, point.subnetwork, "all"),
            "kept": costs.parameters(s.layout, point.subnetwork) / costs.parameters(s.layout, s.whole),
            "subnetwork": point.subnetwork.to_json(),
        }
        for point, row in zip(best, held, strict=True)
    ]
    rows = [row for row in rows if all(map(math.isfinite, row["values"].values()))]
    return {
        "tried": [list(point.values) for point in finite],
        "front": pareto.front(rows, lambda row: tuple(row["values"].values())),
    }


# --------------------------------------------------------------------------------------------------------------- axes


def _axis(s: Session, p: Prepared, name: str, computed: Mapping[Any, Cost]) -> Axis:
    """One objective by its name in the configuration; computed: those that are no measurements."""
    if name in ("kl", "perplexity"):
        kind: Any = "kl" if name == "kl" else "ppl"
        windows = replace(p.objective, weights=p.database, kind=kind, forward_tokens=0.0)
        return _of_tokens(s, p, name, windows, SEARCHED, math.exp if name == "perplexity" else None)
    if name == "loss":
        return _of_tokens(s, p, name, _labelled(s, p), 0)
    if name == "accuracy":
        return _of_tasks(s, p)
    return _of_cost(name, computed[name])


def _of_tokens(
    s: Session, p: Prepared, name: str, objective: Divergence, rung: int, shown: Callable[[float], float] | None = None
) -> Axis:
    """An objective that is measured on windows of tokens; shown: what becomes of nats."""
    ledger = Ledger(open_record(s, p, f"front {name}"), objective, "front")

    def judged(subs: Sequence[SubNetwork], draw: int, rung: int) -> list[Judged]:
        before = objective.forward_tokens
        found = ledger.judge(subs, draw, rung)
        s.run.count_tokens(int(objective.forward_tokens - before))
        return found

    def value(nats: float) -> float:
        return nats if shown is None or not math.isfinite(nats) else shown(min(nats, 700.0))

    def held(subs: Sequence[SubNetwork]) -> list[Held]:
        return [
            (value(one.value), _error(one.windows) * (value(one.value) if shown else 1.0))
            for one in judged(subs, -1, len(objective.windows) - 1)
        ]

    return Axis(name, lambda subs: [value(one.value) for one in judged(subs, 0, rung)], held)


def _error(windows: Sequence[float]) -> float:
    return statistics.stdev(windows) / math.sqrt(len(windows)) if len(windows) > 1 else 0.0


def _labelled(s: Session, p: Prepared) -> Divergence:
    """The loss on windows of the training data that are not trained on: half of them for the search, half held out."""
    _, found = supernet.windows(s)
    assert found is not None  # check
    carries = (found.labels != IGNORED).any(1)
    ids, labels = found.ids[carries], found.labels[carries]
    half = len(ids) // 2
    if not half:
        raise UserError("the windows of --train that are not trained on carry no loss; give a higher train.holdout")
    return Divergence(
        s.stream, ids[:half], p.database, kind="ppl", windows=(half,), holdout=ids[half:], labels=labels[:half],
        holdout_labels=labels[half:], seed=s.config.seed,
    )  # fmt: skip


class TaskError:
    """One minus the mean accuracy of tasks, of candidates that are active one after the other; never on a copy.

    Draws from 0 up take the first `front.task_limit` examples of each task, negative ones as many others.
    """

    def __init__(self, s: Session, p: Prepared) -> None:
        self.s, self.weights, self.asked = s, p.database, asked_for(s.config.front.tasks)

    def n_tokens(self, rung: int) -> int:
        """Nothing is said of them: examples are of all lengths."""
        return 0

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[float]:
        for sub in subs:
            yield 1 - self.found(sub, draw)["mean"]

    def found(self, sub: SubNetwork, draw: int) -> dict[str, Any]:
        """What lm-eval says of one candidate."""
        s, c = self.s, self.s.config.front
        with torch.no_grad(), activate(s.model, s.family, sub, self.weights(sub)):
            return evaluate_tasks(
                s.model, s.tokenizer, self.asked, path=c.tasks_path, limit=c.task_limit,
                skip=c.task_limit if draw < 0 else 0, seed=s.config.seed, opened=True,
            )  # fmt: skip


def _of_tasks(s: Session, p: Prepared) -> Axis:
    objective = TaskError(s, p)
    judge: Objective = objective
    ledger = Ledger(open_record(s, p, f"front accuracy of {_examples(s)}"), judge, "front")

    def held(subs: Sequence[SubNetwork]) -> list[Held]:
        found = (objective.found(sub, -1) for sub in subs)  # not in the record, which has no place for the errors
        return [(1 - one["mean"], one["mean_se"]) for one in found]

    return Axis("accuracy", lambda subs: [one.value for one in ledger.judge(subs, 0, 0)], held)


def _examples(s: Session) -> str:
    """Which examples an accuracy is of: tasks of other files are another objective, whatever their names are."""
    c = s.config.front
    files = f", files {digest(fingerprint(Path(c.tasks_path)))[:12]}" if c.tasks_path else ""
    return f"{' '.join(c.tasks)} x {c.task_limit}{files}"


def _of_cost(name: str, cost: Cost) -> Axis:
    return Axis(name, lambda subs: [cost(sub) for sub in subs], lambda subs: [(cost(sub), None) for sub in subs])


def _cost(s: Session, name: str) -> Cost:
    """What is computed, not measured on candidates."""
    if name == "latency":
        return (s.timetable or timetable_of(s)).request_ms
    exact: dict[str, Callable[[SubNetwork], float]] = {
        "parameters": lambda sub: costs.parameters(s.layout, sub, "all"),
        "flops": lambda sub: costs.flops(s.layout, sub, length=WINDOW),
        "bytes": lambda sub: costs.n_bytes(s.layout, sub, s.width),
    }
    return lambda sub: float(exact[name](sub))


__all__ = ["FILE", "Axis", "check", "numbered", "point", "prepare", "search_front", "volumes"]
