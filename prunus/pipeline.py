"""Floor 5: the story: from a pretrained model to a front of smaller ones, on one screen; and each step alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from prunus import choosing, describe, finishing, fronts, steps
from prunus.baselines import rivals
from prunus.config import CompressConfig, flatten
from prunus.models import loading
from prunus.models.families import family_of
from prunus.progress import Progress, silent
from prunus.recording.changes import TARGETS
from prunus.recording.report import write_report
from prunus.recording.run import Run, read_manifest
from prunus.steps import Session
from prunus.subnetwork import SubNetwork
from prunus.training import supernet

Step = Literal["score", "train", "reform", "search", "extract", "report"]


def compress(config: CompressConfig, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """The whole method: a run directory with one checkpoint per target, and its report.

    The same call again resumes. Returns the report's data, with the path of the report under "report".
    Raises UserError for everything that the user can mend, before long work wherever it can be known.
    """
    return _run(config, Path(out), "report", progress)


def step(
    out: str | Path, name: Step, overrides: Mapping[str, Any], progress: Progress = silent, *, again: bool = False
) -> dict[str, Any]:
    """One step of an existing run, with what it needs before it; overrides (dotted keys) change it and later ones.

    again: do it again although it is done. What cannot be done is refused before anything is recorded or deleted.
    """
    raw = {**flatten(read_manifest(out)["config"]), **overrides}
    config = CompressConfig.from_dict(raw)  # refuses what does not fit together before anything is deleted
    if name not in ("extract", "report"):
        rivals.refuse_step(config, name)
    typed = flatten(config.to_dict())  # "8" is 8
    asked = {key: typed[key] for key in overrides}
    if set(TARGETS) & overrides.keys():
        asked["keep"] = config.keep
    loaded: list[loading.Loaded] = []
    with Run.reopen(out) as run:

        def admit(run: Run) -> None:
            if config.method == rivals.OURS:
                loaded.append(_load(config))
                run.refuse_other(asdict(loaded[0].source), "choose another --out")
                shapes = [key for key in asked if key.startswith("budget.") and key not in TARGETS]
                s = _session(run, config, loaded[0], progress)
                _check(s, own_table=run.done("latency.json") and not shapes, anew=name in ("score", "train"))

        raw = run.change(name, asked, again=again, admit=admit)
    return _run(CompressConfig.from_dict(raw), Path(out), name, progress, *loaded)


def _load(config: CompressConfig) -> loading.Loaded:
    windows = config.calibration.samples + config.calibration.holdout, config.calibration.length
    return loading.load_configured(config, windows=windows)


def _session(run: Run, config: CompressConfig, loaded: loading.Loaded, progress: Progress) -> Session:
    family = family_of(loaded.model.config)
    return Session(run, config, loaded.model, loaded.tokenizer, loaded.generation_config, family, progress)


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
    model = loaded or _load(config)

    def admit(run: Run) -> None:
        _check(_session(run, config, model, progress), own_table=run.done("latency.json"))

    with Run.open(out, config.to_dict(), asdict(model.source), admit=admit) as run:
        s = _session(run, config, model, progress)
        _check(s)
        ids, holdout = steps.calibrate(s)
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
        weights = finishing.refit(s, prepared, ids, chosen)
        dense = dense or describe.measure_dense(s)
        figures = {name: describe.measure(s, prepared, name, sub, weights[name]) for name, sub in chosen.items()}
        for name, sub in chosen.items():
            card, manifest = describe.card(s, name, figures[name], dense), describe.manifest(s, sub, figures[name])
            finishing.save_network(s, name, sub, weights[name], card, manifest)
        if last == "extract":
            return describe.found(s, chosen)
        command = shlex.join(["prunus", "compress", config.model, "--out", str(out), "--config", f"{out}/config.yaml"])
        front = fronts.search_front(s, prepared, chosen) if asked else None
        data = describe.report_data(s, prepared, dense, figures, command)
        if front:
            data["front"] = front
        return {**data, "report": str(write_report(run.directory, data))}
