"""Floor 5: `pick()`: a network for any other budget of a run, in seconds: no new search, no long pass.

The nested order and the error curves hold a network for every budget; the networks that the run has finished tell what
its weights and its divergence will be.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from prunus import choosing, describe, finishing, steps
from prunus.baselines import rivals
from prunus.config import STEPS, BudgetConfig, CompressConfig
from prunus.errors import UserError
from prunus.models import checkpoint, loading
from prunus.models.families import family_of
from prunus.models.slicing import Override, extract
from prunus.progress import Progress, silent
from prunus.recording.artefact import load_json, load_tensors
from prunus.recording.run import Run, read_manifest
from prunus.reforming import neighbours, sensitivity, sequential
from prunus.steps import MICRO, Prepared, Session
from prunus.subnetwork import SubNetwork
from prunus.timing.forecast import forecast

STEP = "pick"  # picks belong to nobody's step: no change of the run makes them stale
STANDS_ON = {  # what a pick reads of a run -> the command that makes it
    "tokens.safetensors": "score",
    "grams": "score",
    "fisher.safetensors": "score",
    "importance.safetensors": "score",
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
    figures: dict[str, Any]  # of its evaluation; empty where there was none


def pick(
    run: str | Path,
    keep: float,
    *,
    keep_of: str | None = None,
    refit: int = 0,
    measure: bool = False,
    out: str | Path | None = None,
    model: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """One more checkpoint of a run, for any budget, and how good it is predicted to be; "picked" is its path.

    keep: the share to keep; keep_of: of `blocks` or `all` parameters (default: what the run counts). measure: also
    measure it. refit: windows of a sequential pass, minutes, kept where held-out windows are the better for it.
    out: where the checkpoint goes; by default into the run, as `models/pick-KEEP`, and into its record. model: where
    the run's model is now, if it was moved. The run's own artefacts stay as they are.
    Raises UserError for a run that has not come to its error curves, a share out of reach, a name that is taken by a
    pick of other settings, and another model than the run's.
    """
    own = _counting(CompressConfig.from_dict(read_manifest(run)["config"]))
    config = _asked(own, keep_of, model, device)
    rivals.refuse_step(own, "pick")
    if refit < 0:
        raise UserError(f"refit is a number of windows, 0 or more; given {refit}")
    with Run.reopen(run, steps=(*STEPS, STEP)) as record:
        _require(record)
        loaded = loading.load_configured(config)
        record.refuse_other(asdict(loaded.source), "name the model that it was made from with --model")
        family = family_of(loaded.model.config)
        s = Session(record, config, loaded.model, loaded.tokenizer, loaded.generation_config, family, progress)
        ids, holdout = steps.calibrate(s)
        p = steps.reform_levels(s, ids, holdout, steps.score(s, ids))
        name = f"pick-{keep:g}" if config.constraint == own.constraint else f"pick-{keep:g}-of-{config.keep_of}"
        return _picked(s, p, ids, keep, name, min(refit, len(ids)), measure, None if out is None else Path(out))


def _counting(config: CompressConfig) -> CompressConfig:
    """A run's configuration, where its targets are times or memory with parameters to count instead."""
    return replace(config, budget=BudgetConfig(), keep=(1.0,)) if config.budget.targets else config


def _asked(config: CompressConfig, keep_of: str | None, model: str | None, device: str | None) -> CompressConfig:
    """The run's configuration with what a pick may change."""
    if keep_of is not None:
        config = CompressConfig.from_dict(
            {**config.to_dict(), "keep_of": keep_of, "search": {**asdict(config.search), "constraint": None}}
        )
    return replace(config, model=model or config.model, device=device or config.device)


def _require(record: Run) -> None:
    """Refuse a run that has not come to its error curves, naming the command that brings it there."""
    settings = record.config["reform"]
    optional = {"fisher.safetensors": "fisher", "sensitivity.json": "sensitivity"}
    unused = {file for file, key in optional.items() if not settings[key]}
    for file, verb in STANDS_ON.items():
        if file not in unused and not record.done(file):
            raise UserError(
                f"{str(record.directory)!r} has not finished what a pick stands on ({file} is missing or damaged); "
                f"do that first: prunus {verb} {record.directory}"
            )


def _picked(
    s: Session, p: Prepared, ids: Tensor, keep: float, name: str, refit: int, measure: bool, out: Path | None
) -> dict[str, Any]:
    whole = s.cost(s.whole)
    _, high = p.space.window(s.cost, keep, of=whole, slack=steps.slack(s))
    finished = _finished(s, p)
    twin = s.run.path(f"models/keep-{keep:g}")
    if name == f"pick-{keep:g}" and twin.is_dir():
        raise UserError(f"the run has a network of that share, searched and refitted: {twin}; take that one")
    around = _around(finished, high)
    sub = choosing.allocated(s, p, high)[0]
    made_of = {
        "subnetwork": sub.key(),
        "refit": refit,
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
    weights = {finishing.address(key): weight.to(s.device) for key, weight in raw.items()}
    found = {**describe.network(s, name, sub), **_foretold(p, sub, finished)}
    found |= _measured(s, p, name, sub, weights, measure, out)
    dense = _dense(s)
    page = describe.card(s, name, found, dense)  # type: ignore[arg-type]
    record = {**describe.manifest(s, sub, found), "pick": {"keep": keep, **made_of}}  # type: ignore[arg-type]
    if out is None:
        target = finishing.save_network(s, name, sub, weights, page, record, step=STEP)
    else:
        small, target = extract(s.model, s.family, sub, weights, uniform=s.config.uniform or None), out
        checkpoint.save(small, s.tokenizer, out, card=page, manifest=record, generation_config=s.generation_config)
    return {
        "chosen": [found],
        "dense": dense,
        "from": [one.name for one in around],
        "notes": _notes(found, around, finished),
        "picked": str(target),
    }


def _finished(s: Session, p: Prepared) -> list[Finished]:
    """The networks that the run has refitted weights of, largest first."""
    found = []
    for file, entry in s.run.manifest["artefacts"].items():
        name = file.removeprefix("search/").removesuffix(".json")
        if entry["step"] != "search" or file != f"search/{name}.json" or not s.run.done(file, entry["inputs"]):
            continue
        sub = SubNetwork.from_json(load_json(s.run.path(file))["subnetwork"])
        if not s.run.done(f"weights/{name}.safetensors", {"subnetwork": sub.key()}):
            continue
        inputs = {"subnetwork": sub.key(), "weights": s.run.sha256(f"weights/{name}.safetensors")}
        judged = f"evaluation/{name}.json"
        figures = load_json(s.run.path(judged)) if s.run.done(judged, inputs) else {}
        found.append(Finished(name, sub, s.cost(sub), sensitivity.predict(p.curves, sub), figures))
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
    start = neighbours.inherit(s.model, s.family, p.database, sub, _with_say(s, sub, around))
    p.database.forget()
    if not len(ids) or not r.sequential or r.method == "none":
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
        weights = {finishing.address(key): weight.to(s.device) for key, weight in raw.items()}
        say = 1 - abs(c - cost) / span if span else 1.0
        found.append(neighbours.Neighbour(near, weights, max(say, 1e-3)))
    return found


def _foretold(p: Prepared, sub: SubNetwork, finished: Sequence[Finished]) -> dict[str, Any]:
    """Divergence and perplexity as the run's measured networks make them likely."""
    predicted = sensitivity.predict(p.curves, sub)
    judged = [one for one in finished if one.figures]
    if not judged:
        return {"predicted_nats": predicted}
    nats = forecast([(one.predicted, one.figures["kl_nats"]) for one in judged], predicted)
    return {"predicted_nats": predicted, "predicted_kl_nats": nats.value, "predicted_factor": nats.factor}


def _dense(s: Session) -> dict[str, Any]:
    """The dense model, with its figures where the run has measured them."""
    file = "evaluation/dense.json"
    return dict(load_json(s.run.path(file))) if s.run.done(file) else dict(describe.network(s, "dense", s.whole))


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
    differing = [key for key in made_of if was.get(key) != made_of[key]]
    if differing:
        words = {"refit": f"refit: {was.get('refit')} there, {made_of['refit']} now", "from": "from other weights",
                 "subnetwork": "other widths"}  # fmt: skip
        raise UserError(
            f"{str(target)!r} is a pick that was made otherwise ({', '.join(words[key] for key in differing)}); "
            "delete it, or choose another --out"
        )


def _notes(found: dict[str, Any], around: Sequence[Finished], finished: Sequence[Finished]) -> list[str]:
    """What a person should know about a pick, in sentences."""
    names = " and ".join(one.name for one in around)
    notes = [f"its weights start from those of {names}" if names else "the run has no refitted network to start from"]
    if not any(one.figures for one in finished):
        notes.append("no network of the run was measured, so nothing says what the error curves' sum means in nats")
    elif found.get("predicted_factor") is None:
        notes.append(
            "it lies beyond the run's networks, or few were measured: nothing says how far to trust the prediction"
        )
    return notes
