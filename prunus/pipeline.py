"""Floor 5: the story: from a pretrained model to a front of smaller ones, on one screen; and each step alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prunus import choosing, describe, finishing, fronts, launched, steps
from prunus.baselines import rivals
from prunus.config import CompressConfig, configured, flatten
from prunus.errors import UserError
from prunus.models import loading
from prunus.models.memory import Work
from prunus.progress import Progress, silent
from prunus.recording.changes import TARGETS
from prunus.recording.reader import ReadOnlyRun
from prunus.recording.report import write_report
from prunus.recording.run import Run, read_manifest
from prunus.steps import Session
from prunus.subnetwork import SubNetwork
from prunus.training import meeting, supernet

Step = Literal["score", "train", "reform", "search", "extract", "report"]


def compress(config: CompressConfig, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """The whole method: a run directory with one checkpoint per target, and its report.

    The same call again resumes. Returns the report's data, with the path of the report under "report".
    Raises UserError for everything that the user can mend, before long work wherever it can be known.
    """
    config = configured(config)
    _refuse_several(bool(config.train.data))
    if not (Path(out) / "manifest.json").is_file():
        refuse_idle(config)
    if not launched.is_main():
        return _join(Path(out))
    with meeting.leading():
        return _run(config, Path(out), "report", progress)


def step(
    out: str | Path, name: Step, overrides: Mapping[str, Any], progress: Progress = silent, *, again: bool = False
) -> dict[str, Any]:
    """One step of an existing run, with what it needs before it; overrides (dotted keys) change it and later ones.

    again: do it again although it is done. What cannot be done is refused before anything is recorded or deleted.
    """
    raw = {**flatten(read_manifest(out)["config"]), **overrides}
    config = CompressConfig.from_dict(raw)  # refuses what does not fit together before anything is deleted
    _refuse_several(name == "train" and bool(config.train.data))
    if name == "train" and not config.train.data:
        raise UserError("this run has no training data; name them with --train FILE")
    config.train.refuse_idle(asked=overrides)
    if "score.method" in overrides:
        _refuse_unordered(config)
    if not launched.is_main():
        return _join(Path(out))
    if name not in ("extract", "report"):
        rivals.refuse_step(config, name)
    typed = flatten(config.to_dict())  # "8" is 8
    asked = {key: typed[key] for key in overrides}
    if set(TARGETS) & overrides.keys():
        asked["keep"] = config.keep
    loaded: list[loading.Loaded] = []

    def admit(run: Run) -> None:
        if config.method == rivals.OURS:
            loaded.append(_load(config, Path(out), name, anew=bool(overrides) or again))
            run.refuse_other(asdict(loaded[0].source), "choose another --out")
            shapes = [key for key in asked if key.startswith("budget.") and key not in TARGETS]
            s = Session.of(run, config, loaded[0], progress)
            _check(s, own_table=run.done("latency.json") and not shapes, anew=name in ("score", "train"))

    with meeting.leading():
        with Run.reopen(out) as run:
            raw = run.change(name, asked, again=again, admit=admit)
        return _run(CompressConfig.from_dict(raw), Path(out), name, progress, *loaded)


def _refuse_several(training: bool) -> None:
    if launched.processes() > 1 and not training:
        raise UserError(
            f"{launched.processes()} processes were started together (WORLD_SIZE), but only a training takes several: "
            "recover, train, and compress with --train; give this command without the launcher"
        )


def refuse_idle(config: CompressConfig) -> None:
    """Raise UserError for settings of a new run that would change nothing."""
    config.train.refuse_idle()
    _refuse_unordered(config)


def _refuse_unordered(config: CompressConfig) -> None:
    if config.score.method != "obs" and config.reform.order == "greedy" and config.method == rivals.OURS:
        raise UserError(
            f"--score {config.score.method} would order nothing: units are ordered by greedy removal, which needs no "
            "score; give --set reform.order=score too, or leave --score out"
        )


def _join(out: Path) -> dict[str, Any]:
    """What the other processes of a training do: wait until the first one has all ready, and train with it."""
    if meeting.called():
        run = ReadOnlyRun(out)
        config = CompressConfig.from_dict(run.config)
        s = Session.of(run, config, _load(config, out, "train"), silent)
        ids, _ = steps.calibrate(s)
        supernet.join(s, ids, steps.score(s, ids))
    meeting.part()
    return {}


def _load(config: CompressConfig, out: Path, last: Step, *, anew: bool = False) -> loading.Loaded:
    return loading.load_configured(config, work=Work.of(config, _left(config, out, last, anew)))


def _left(config: CompressConfig, out: Path, last: Step, anew: bool) -> tuple[str, ...]:
    """The steps up to `last` that a run has not done yet, for the estimate of the memory; anew: the last one counts."""
    names = [target.name for target in config.targets]
    made = {
        "score": ["importance.safetensors"],
        "train": ["supernet"],
        "reform": ["errors.safetensors"],
        "search": [f"search/{name}.json" for name in names],
        "extract": [f"weights/{name}.safetensors" for name in names],
        "evaluate": [kind.format(name) for name in names for kind in ("evaluation/{}.json", "models/{}")],
    }
    manifest = read_manifest(out) if (out / "manifest.json").is_file() else {}
    artefacts, before = manifest.get("artefacts", {}), manifest.get("config", {})
    fresh = {file for file, entry in artefacts.items() if not entry.get("stale")}
    order = list(made)
    until = order[: order.index(last) + 1] if last in order[:4] else order
    redone = set(until[order.index("evaluate" if last == "report" else last) :] if anew else ())
    redone |= {"evaluate"} if before.get("test_text") != config.test_text else set()
    return tuple(step for step in until if step in redone or not fresh.issuperset(made[step]))


def _check(s: Session, own_table: bool = True, anew: bool = False) -> None:
    """Raise UserError for what cannot be done, before any long work; anew: the training is done again."""
    steps.check_request(s, own_table)
    fronts.check(s)
    if s.config.train.data:
        supernet.check(s, anew)


def _run(
    config: CompressConfig, out: Path, last: Step, progress: Progress, loaded: loading.Loaded | None = None
) -> dict[str, Any]:
    if config.method != rivals.OURS:
        return rivals.compress(config, out, progress)
    model = loaded or _load(config, out, last)

    def admit(run: Run) -> None:
        s = Session.of(run, config, model, progress)
        _check(s, own_table=run.done("latency.json"))
        if last in ("extract", "report"):
            describe.check_text(s)

    with Run.open(out, config.to_dict(), asdict(model.source), admit=admit) as run:
        s = Session.of(run, config, model, progress)
        _check(s)
        if last in ("extract", "report") and not run.done("evaluation/dense.json"):
            describe.check_text(s)
        if last in ("search", "report"):
            fronts.prepare(s)
        ids, holdout = steps.calibrate(s)
        if last in ("extract", "report"):
            describe.check_unseen(s, ids)
        orders = steps.score(s, ids)
        if last == "score":
            return describe.scores(s, orders)
        dense = None
        if config.train.data:
            dense = describe.measure_dense(s)  # while the weights are the dense model's
            orders = supernet.train(s, ids, orders)
        if last == "train":
            return describe.trained(s)
        prepared = steps.reform_levels(s, ids, holdout, orders)
        if last == "reform":
            return describe.levels(s, prepared)
        chosen: dict[str, SubNetwork] = {}
        for target in config.targets:
            chosen[target.name] = choosing.search_one(s, prepared, target, starts=tuple(chosen.values()))
        asked = bool(config.front.objectives)
        if last == "search":
            return describe.found(s, chosen, fronts.search_front(s, prepared, chosen) if asked else None)
        finishing.refit(s, prepared, ids, chosen)
        dense = dense or describe.measure_dense(s)
        trained = describe.measure_trained(s) if s.tier and last == "report" else None
        figures = {}
        for name, sub in chosen.items():  # one network's weights at a time
            figures[name] = describe.measure(s, prepared, name, sub, finishing.stored(s, name))
        for name, sub in chosen.items():
            card, manifest = describe.card(s, name, figures[name], dense), describe.manifest(s, sub, figures[name])
            finishing.save_network(s, name, sub, partial(finishing.stored, s, name), card, manifest)
        if last == "extract":
            return describe.found(s, chosen)
        command = shlex.join(["prunus", "compress", config.model, "--out", str(out), "--config", f"{out}/config.yaml"])
        front = fronts.search_front(s, prepared, chosen) if asked else None
        data = describe.report_data(s, prepared, dense, figures, command, trained)
        if front:
            data["front"] = front
        return {**data, "report": str(write_report(run.directory, data))}
