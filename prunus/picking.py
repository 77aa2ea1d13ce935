"""Floor 5: `pick()`: a network for any other budget of a run, or a point of its front, in seconds: no search, no pass.

The nested order and the error curves hold a network for every budget, a front has its own; the networks that the run
has finished tell what the weights and the divergence will be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from prunus import choosing, describe, finishing, fronts, steps
from prunus.baselines import rivals
from prunus.config import STEPS, CompressConfig, settings
from prunus.errors import UserError
from prunus.models import checkpoint, loading
from prunus.models.slicing import Override, extract
from prunus.progress import Progress, silent
from prunus.recording.artefact import load_json, load_tensors
from prunus.recording.run import Run, read_manifest
from prunus.reforming import neighbours, sensitivity, sequential
from prunus.searching.options import MEASURED
from prunus.steps import MICRO, Prepared, Session
from prunus.subnetwork import SubNetwork
from prunus.targets import LIMITS, TIMES
from prunus.timing import runtimes
from prunus.timing.forecast import forecast
from prunus.timing.timetable import Timetable
from prunus.training import supernet

STEP = "pick"  # picks belong to nobody's step: no change of the run makes them stale
STANDS_ON = {  # what a pick reads of a run -> the command that makes it
    "tokens.safetensors": "score",
    "grams": "score",
    "fisher.safetensors": "score",
    "importance.safetensors": "score",
    "units.safetensors": "train",
    "supernet": "train",
    "grams-trained": "train",
    "fisher-trained.safetensors": "train",
    "errors.safetensors": "reform",
    "sensitivity.json": "reform",
}


@dataclass(frozen=True)
class Finished:
    """A network that the run has searched and refitted, with what was measured on it."""

    name: str
    sub: SubNetwork
    cost: float
    predicted: float  # nats, by the curves
    belief: float | None  # in the measured levels, of the allocation that its search began with
    figures: dict[str, Any]  # of its evaluation; empty where there was none


@dataclass(frozen=True)
class Wanted:
    """The network that a pick was asked for."""

    name: str
    sub: SubNetwork
    cost: float  # where it stands among the run's networks
    asked: dict[str, Any]  # as the checkpoint remembers it
    front: dict[str, Any]  # what the front says of it; empty for a share


def pick(
    run: str | Path,
    keep: float | None = None,
    *,
    point: int | None = None,
    budget: Mapping[str, Any] | None = None,
    keep_of: str | None = None,
    refit: int = 0,
    measure: bool = False,
    out: str | Path | None = None,
    model: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """One more checkpoint of a run, and how good it is predicted to be; "picked" is its path.

    keep: the share to keep; keep_of: of `blocks` or `all` parameters (default: what the run counts). In the place of
    a share: point, the number of a point of the run's front; or budget, one limit of `BudgetConfig` (speedup,
    latency_ms, tokens_per_second, memory_mb) with what it changes of the run's request (prompt, batch, generate,
    runtime, quant, context), as in {"latency_ms": 40, "prompt": 256}. A time of another request than the run's is
    measured on this device first, unless the cache has its table. measure: also measure it. refit: windows of a
    sequential pass, minutes, kept where held-out windows are the better for it. out: where the checkpoint goes; by
    default into the run, as `models/pick-KEEP`, `models/pick-latency-40ms` and the like or `models/pick-point-N`, and
    into its record. model: where the run's model is now, if it was moved. The run's own artefacts stay as they are.
    Raises UserError for a run that has not come to its error curves (or has no front, or no such point of it), a share
    or budget out of reach, a name that is taken by a pick of other settings, and another model than the run's.
    """
    _refuse_mixed(keep, point, budget, keep_of, refit)
    whole_config = CompressConfig.from_dict(read_manifest(run)["config"])
    own = _counting(whole_config)
    config = _limited(whole_config, budget) if budget else own
    config = _asked(config, keep_of, model, device)
    rivals.refuse_step(own, "pick")
    if refit and own.reform.method == "none":
        raise UserError("refit is a pass of reformation, and reform.method is none in this run; leave --refit out")
    with Run.reopen(run, steps=(*STEPS, STEP)) as record:
        _require(record)
        row = {} if point is None else fronts.point(record, point)
        loaded = loading.load_configured(config)
        record.refuse_other(asdict(loaded.source), "name the model that it was made from with --model")
        s = Session.of(record, config, loaded, progress)
        s.timetable = _table(s, whole_config)
        ids, holdout = steps.calibrate(s)
        orders = steps.score(s, ids)
        if config.train.data:
            orders = supernet.train(s, ids, orders)  # loads it: it is done, or _require had refused
        p = steps.reform_levels(s, ids, holdout, orders)
        finished = _finished(s, p)
        if budget:
            wanted = _of_budget(s, p, finished, whole_config)
        elif keep is None:
            wanted = _of_point(s, finished, row)
        else:
            ending = "" if config.constraint == own.constraint else f"-of-{config.keep_of}"
            wanted = _of_share(s, p, finished, keep, ending)
        return _picked(s, p, ids, finished, wanted, min(refit, len(ids)), measure, None if out is None else Path(out))


def _refuse_mixed(
    keep: float | None, point: int | None, budget: Mapping[str, Any] | None, keep_of: str | None, refit: int
) -> None:
    """Refuse what does not fit together, before anything is read."""
    limits: list[str] = [kind for kind in LIMITS if (budget or {}).get(kind) not in (None, (), [])]
    if budget and not limits:
        known = ", ".join("--" + kind.replace("_", "-") for kind in LIMITS)
        raise UserError(
            f"{next(iter(budget))} says what a budget is counted for, and no budget was given; add one of {known}"
        )
    given = [] if keep is None else [f"keep {keep:g}"]
    given += ([] if point is None else [f"point {point}"]) + limits
    if len(given) != 1:
        raise UserError(
            "a pick is one share (--keep X), one budget (--latency-ms X and the like) or one point of the run's front "
            f"(--point N); given {' and '.join(given) or 'none of them'}"
        )
    if keep is None and keep_of is not None:
        raise UserError(f"keep_of says what a share is of, given {keep_of} with {given[0]}; leave it out")
    if keep is not None:
        settings()["keep"].parse(keep)  # refuses 70, naming .7
    if refit < 0:
        raise UserError(f"refit is a number of windows, 0 or more; given {refit}")


def _limited(config: CompressConfig, budget: Mapping[str, Any]) -> CompressConfig:
    """A run's configuration with one other budget as its only target; what the budget leaves out is as in the run."""
    raw = config.to_dict()
    limits: dict[str, Any] = dict.fromkeys(LIMITS, ())
    limits |= {key: [value] if key in LIMITS and not isinstance(value, list | tuple) else value
               for key, value in budget.items()}  # fmt: skip
    raw["budget"] = {**raw["budget"], **limits}
    raw["search"] = {**raw["search"], "constraint": None}
    found = CompressConfig.from_dict({**raw, "keep": []})
    if len(found.targets) > 1:
        values = " ".join(f"{target.value:g}" for target in found.targets)
        raise UserError(f"one pick at a time, given {found.targets[0].kind} {values}; give one value")
    return found


def _timed(config: CompressConfig) -> tuple[Any, ...]:
    """What the times of a configuration's request depend on."""
    b = config.budget
    return (b.runtime, b.quant if b.runtime == "llama.cpp" else "", b.prompt, b.batch, b.generate)


def _table(s: Session, run: CompressConfig) -> Timetable | None:
    """The table that a pick goes by: the run's own where it asks for the same times; None where nothing is timed."""
    if s.run.done("latency.json") and _timed(s.config) == _timed(run):
        own = steps.timetable_of(s)
        if s.config.budget.runtime == "llama.cpp" or _same_place(own.key, s.model):
            return own
    if s.config.constraint not in TIMES:
        return None
    space = steps.widest_space(s)
    if len(space.hidden) > 1:
        raise UserError(
            f"times are measured at the model's own hidden size, and this run's space has {len(space.hidden)}; pick by "
            "--keep or --memory-mb"
        )
    runtimes.check(s.model, s.family, s.config.budget, space)
    return runtimes.measure(s.model, s.family, s.config.budget, progress=s.progress)


def _same_place(key: Mapping[str, Any], model: Any) -> bool:
    """True where a table of PyTorch was measured on the kind of device, and in the type, that the model is on."""
    parameter = next(model.parameters())
    here = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else f"{parameter.device.type}, "
    return str(key["device"]).startswith(here) and key["dtype"] == str(parameter.dtype).removeprefix("torch.")


def _counting(config: CompressConfig) -> CompressConfig:
    """A run's configuration, where its targets are times or memory with parameters to count instead."""
    if not config.budget.targets:
        return config
    none: Any = dict.fromkeys(LIMITS, ())  # the request that was timed stays
    return replace(config, budget=replace(config.budget, **none), keep=(1.0,))


def _asked(config: CompressConfig, keep_of: str | None, model: str | None, device: str | None) -> CompressConfig:
    """The run's configuration with what a pick may change."""
    if keep_of is not None:
        config = CompressConfig.from_dict(
            {**config.to_dict(), "keep_of": keep_of, "search": {**asdict(config.search), "constraint": None}}
        )
    return replace(config, model=model or config.model, device=device or config.device)


def _require(record: Run) -> None:
    """Refuse a run that has not come to its error curves, naming the command that brings it there."""
    reform, trained = record.config["reform"], bool(record.config["train"]["data"])
    unused = {"sensitivity.json"} if not reform["sensitivity"] else set()
    unused |= {file for file in STANDS_ON if "fisher" in file and not reform["fisher"]}
    unused |= {file for file, verb in STANDS_ON.items() if verb == "train" and not trained}
    for file, verb in STANDS_ON.items():
        if file not in unused and not record.done(file):
            raise UserError(
                f"{str(record.directory)!r} has not finished what a pick stands on ({file} is missing or damaged); "
                f"do that first: prunus {verb} {record.directory}"
            )


def _allocated(s: Session, p: Prepared, finished: Sequence[Finished], budget: float) -> SubNetwork:
    """The allocation within a budget, by curves that believe the measured levels as the run's networks beside it do."""
    beliefs = [one.belief for one in _around(finished, budget) if one.belief is not None]
    return next(iter(choosing.allocated(s, p, budget, [fmean(beliefs) if beliefs else 1.0])))


def _of_share(s: Session, p: Prepared, finished: Sequence[Finished], keep: float, ending: str) -> Wanted:
    """What the curves call best for a share."""
    _, high = p.space.window(s.cost, keep, of=s.cost(s.whole), slack=steps.slack(s))
    twin = s.run.path(f"models/keep-{keep:g}")
    if not ending and twin.is_dir():
        raise UserError(f"the run has a network of that share, searched and refitted: {twin}; take that one")
    return Wanted(f"pick-{keep:g}{ending}", _allocated(s, p, finished, high), high, {"keep": keep}, {})


def _of_budget(s: Session, p: Prepared, finished: Sequence[Finished], run: CompressConfig) -> Wanted:
    """What the curves call best within a time or a memory."""
    (target,) = s.config.targets
    steps.check_reach(s, p.space, target)
    same = _timed(s.config) == _timed(run) or s.config.constraint not in TIMES
    if same and target in run.targets and (twin := s.run.path(f"models/{target.name}")).is_dir():
        raise UserError(f"the run has a network of that budget, searched and refitted: {twin}; take that one")
    _, high = p.space.window(s.cost, s.share(target), of=s.cost(s.whole), slack=steps.slack(s))
    b = s.config.budget
    asked: dict[str, Any] = {target.kind: target.value, "prompt": b.prompt, "batch": b.batch, "generate": b.generate}
    asked |= {"runtime": b.runtime} if s.config.constraint in TIMES else {"context": s.context}
    return Wanted(f"pick-{target.name}", _allocated(s, p, finished, high), high, asked, {})


def _of_point(s: Session, finished: Sequence[Finished], row: dict[str, Any]) -> Wanted:
    """A point of the run's front."""
    number, sub = row["point"], SubNetwork.from_json(row["subnetwork"])
    for name in (one.name for one in finished if one.sub == sub):
        if (twin := s.run.path(f"models/{name}")).is_dir():
            raise UserError(
                f"point {number} is a network of the run's own, searched and refitted: {twin}; take that one"
            )
    asked = {"point": number, "objectives": list(row["values"])}
    return Wanted(f"pick-point-{number}", sub, s.cost(sub), asked, row)


def _picked(
    s: Session,
    p: Prepared,
    ids: Tensor,
    run: Sequence[Finished],
    wanted: Wanted,
    refit: int,
    measure: bool,
    out: Path | None,
) -> dict[str, Any]:
    name, sub = wanted.name, wanted.sub
    finished = [one for one in run if one.sub.hidden == s.whole.hidden]  # others have no curves
    around = _around(finished, wanted.cost) if sub.hidden == s.whole.hidden else []
    made_of = {
        "subnetwork": sub.key(),
        "refit": refit,
        "levels": s.run.sha256("errors.safetensors"),
        "from": {one.name: s.run.sha256(f"weights/{one.name}.safetensors") for one in around},
    }
    _refuse_taken(s, name, made_of, out)

    def compute() -> dict[str, Tensor]:
        with s.progress(f"weights of {name}", len(s.stream) * refit * ids.shape[1]) as advance:
            return finishing.named(_weights(s, p, ids[:refit], sub, around, advance))

    if out is None:
        raw = s.run.do(STEP, f"weights/{name}.safetensors", compute, inputs=made_of)
    else:
        raw = compute()
    weights = finishing.loaded_weights(s, raw)
    found = {**describe.network(s, name, sub), **_foretold(s, p, sub, finished)}
    found |= _measured(s, p, name, sub, weights, measure, out)
    dense = {**describe.network(s, "dense", s.whole), **_dense(s)}
    if wanted.front:
        found["in_front"] = {axis: [v, wanted.front["errors"][axis]] for axis, v in wanted.front["values"].items()}
        dense["in_front"] = {axis: list(one) for axis, one in wanted.front["dense"].items()}
    page = describe.card(s, name, found, dense)  # type: ignore[arg-type]
    record = {**describe.manifest(s, sub, found), "pick": {**wanted.asked, **made_of}}  # type: ignore[arg-type]
    if out is None:
        target = finishing.save_network(s, name, sub, lambda: weights, page, record, step=STEP)
    else:
        small, target = extract(s.model, s.family, sub, weights, uniform=s.config.uniform or None), out
        checkpoint.save(
            small, s.tokenizer, out, card=page, manifest=record, generation_config=s.generation_config, dtype=s.dtype
        )
    return {
        "chosen": [found],
        "dense": dense,
        "from": [one.name for one in around],
        "notes": _notes(s, found, around, finished),
        "picked": str(target),
    }


def _finished(s: Session, p: Prepared) -> list[Finished]:
    """The networks that the run has refitted weights of, largest first."""
    found = []
    for file, entry in s.run.manifest["artefacts"].items():
        name = file.removeprefix("search/").removesuffix(".json")
        if entry["step"] != "search" or file != f"search/{name}.json" or not s.run.done(file, entry["inputs"]):
            continue
        searched = load_json(s.run.path(file))
        sub = SubNetwork.from_json(searched["subnetwork"])
        if not s.run.done(f"weights/{name}.safetensors", {"subnetwork": sub.key()}):
            continue
        inputs = {"subnetwork": sub.key(), "weights": s.run.sha256(f"weights/{name}.safetensors")}
        judged = f"evaluation/{name}.json"
        figures = load_json(s.run.path(judged)) if s.run.done(judged, inputs) else {}
        nats = sensitivity.predict(p.curves, sub)
        found.append(Finished(name, sub, s.cost(sub), nats, searched.get("belief"), figures))
    return sorted(found, key=lambda one: one.cost, reverse=True)


def _around(finished: Sequence[Finished], budget: float) -> list[Finished]:
    """The next larger and the next smaller of the run's networks, where there are any."""
    larger, smaller = [one for one in finished if one.cost > budget], [one for one in finished if one.cost <= budget]
    return [*larger[-1:], *smaller[:1]]


def _weights(
    s: Session, p: Prepared, ids: Tensor, sub: SubNetwork, around: Sequence[Finished], advance: sequential.Advance
) -> Override:
    """What the neighbours' weights say, and then a sequential pass over windows (n, length) where that is better."""
    r = s.config.reform
    if sub.hidden != s.whole.hidden:  # its channels have no dense target: the super-network's own weights
        return p.database(sub)
    start = neighbours.inherit(s.model, s.family, p.database, sub, _with_say(s, sub, around))
    p.database.forget()
    if not len(ids):
        return start
    settings = sequential.SequentialSettings(
        drift=r.drift, damping=r.sequential_damping, reader_damping=r.readers, reader_stride=1, micro=MICRO
    )
    assert p.objective.holdout is not None
    judge = sequential.Judge(s.stream, p.objective.holdout[: finishing.JUDGED, : finishing.SHORT], [(sub, start)])
    first = steps.openings(s, ids)
    (new,) = sequential.refit_all(
        s.stream, ids, [(sub, start)], settings, openings=first, accept=judge, advance=advance
    )
    before, after = (fmean(finishing.holdout_nats(s, p, sub, weights)) for weights in (start, new))
    return new if after < before else start


def _with_say(s: Session, sub: SubNetwork, around: Sequence[Finished]) -> list[neighbours.Neighbour]:
    """The neighbours with their weights; their say falls linearly with what they cost more or less."""
    ends = [(one.cost, one.sub, one.name) for one in around]
    cost, whole = s.cost(sub), s.cost(s.whole)
    if len(around) == 1 and around[0].cost < cost:  # above the largest: the dense model is the other neighbour
        ends.append((whole, s.whole, ""))
    span = max(c for c, _, _ in ends) - min(c for c, _, _ in ends) if ends else 0.0
    found = []
    for c, near, name in ends:
        raw = load_tensors(s.run.path(f"weights/{name}.safetensors")) if name else {}
        weights = finishing.loaded_weights(s, raw)
        say = 1 - abs(c - cost) / span if span else 1.0
        found.append(neighbours.Neighbour(near, weights, max(say, 1e-3)))
    return found


def _foretold(s: Session, p: Prepared, sub: SubNetwork, finished: Sequence[Finished]) -> dict[str, Any]:
    """Divergence and perplexity as the run's measured networks make them likely."""
    if sub.hidden != s.whole.hidden:
        return {}
    predicted = sensitivity.predict(p.curves, sub)
    judged = [one for one in finished if one.figures]
    if not judged:
        return {"predicted_nats": predicted}
    nats = forecast([(one.predicted, one.figures["kl_nats"]) for one in judged], predicted)
    return {"predicted_nats": predicted, "predicted_kl_nats": nats.value, "predicted_factor": nats.factor}


def _dense(s: Session) -> dict[str, Any]:
    """The dense model's figures, where the run has measured them."""
    file = "evaluation/dense.json"
    return dict(load_json(s.run.path(file))) if s.run.done(file) else {}


def _measured(
    s: Session, p: Prepared, name: str, sub: SubNetwork, weights: Override, asked: bool, out: Path | None
) -> dict[str, Any]:
    """Figures that were measured now, or before in this run; none where nobody asked."""
    if out is not None:
        return describe.figures(s, p, name, sub, weights) if asked else {}
    file = f"evaluation/{name}.json"
    inputs = {"subnetwork": sub.key(), "weights": s.run.sha256(f"weights/{name}.safetensors")}
    if not asked and not s.run.done(file, inputs):
        return {}
    with s.progress(f"evaluation of {name}"):
        found = s.run.do(STEP, file, lambda: describe.figures(s, p, name, sub, weights), inputs=inputs)
    return dict(found)


def _refuse_taken(s: Session, name: str, made_of: dict[str, Any], out: Path | None) -> None:
    """Refuse before the work what stands where the checkpoint would go, unless it is the same pick."""
    if out is None:
        target, entry = s.run.path(f"models/{name}"), s.run.manifest["artefacts"].get(f"weights/{name}.safetensors")
        was = entry["inputs"] if entry is not None else None
    else:
        target = out
        was = checkpoint.verify(out).get("pick") if (out / checkpoint.MANIFEST).is_file() else None
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if was is None:
        raise UserError(f"{str(target)!r} is in the way and is no pick of this run; choose another --out")
    was = {"levels": made_of["levels"], **was}  # older picks do not say
    differing = [key for key in made_of if was.get(key) != made_of[key]]
    if differing:
        words = {
            "refit": f"refit: {was.get('refit')} there, {made_of['refit']} now",
            "from": "from other weights",
            "levels": "on another reformation",
            "subnetwork": "other widths",
        }
        raise UserError(
            f"{str(target)!r} is a pick that was made otherwise ({', '.join(words[key] for key in differing)}); "
            "delete it, or choose another --out"
        )


def _notes(s: Session, found: dict[str, Any], around: Sequence[Finished], finished: Sequence[Finished]) -> list[str]:
    """What a person should know about a pick, in sentences."""
    if found["hidden"] != s.whole.hidden:
        return ["it lacks hidden channels, so its weights are the super-network's own, not refitted, and nothing is "
                "predicted"]  # fmt: skip
    names = " and ".join(one.name for one in around)
    notes = [f"its weights start from those of {names}" if names else "the run has no refitted network to start from"]
    if names and any(axis in MEASURED for axis in found.get("in_front", {})):
        notes.append("the front judged it with one-shot weights; --measure says what it is worth with these")
    if not any(one.figures for one in finished):
        notes.append("no network of the run was measured, so nothing says what the error curves' sum means in nats")
    elif found.get("predicted_factor") is None:
        notes.append(
            "it lies beyond the run's networks, or few were measured: nothing says how far to trust the prediction"
        )
    return notes
