"""Floor 5: a run of somebody else's method: calibrated, evaluated, saved and reported as a run of ours."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunus import describe, steps
from prunus.baselines.subject import Outcome, Subject
from prunus.baselines.table import OURS, Baseline, find
from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.evaluation import kl_divergence, parameters
from prunus.models import checkpoint, costs, loading
from prunus.models.families import family_of
from prunus.models.memory import Work
from prunus.progress import Progress
from prunus.recording.artefact import fingerprint
from prunus.recording.report import write_report
from prunus.recording.run import Run
from prunus.steps import Session
from prunus.texts import calibration
from prunus.texts.sampling import check_length


def check(config: CompressConfig) -> Baseline:
    """The method that a configuration names; raises UserError for what rivals cannot be asked."""
    baseline = find(config.method)
    if _other_budget(config):
        raise UserError(
            f"{config.method} goes by shares of the decoder blocks' parameters; give --keep, without --keep-of all, "
            "other constraints or budgets (both shares are in the report)"
        )
    if config.train.data:
        raise UserError(f"{config.method} is not trained; leave --train out, and give the checkpoint to prunus recover")
    if config.front.objectives:
        raise UserError(f"--front is for our own search; {config.method} has none, so leave it out")
    if config.uniform:
        raise UserError(f"--uniform is for our own search; {config.method} keeps what it keeps, so leave it out")
    return baseline


def _other_budget(config: CompressConfig) -> bool:
    """True if a configuration asks for something else than shares of the decoder blocks' parameters."""
    blocks = config.search.constraint in (None, "parameters-blocks") and config.keep_of == "blocks"
    return bool(config.budget.targets) or not blocks


def refuse_unfair(config: CompressConfig, methods: Sequence[str]) -> None:
    """Raise UserError for settings by which a method of a bench would be asked for, or given, what others are not."""
    others = [method for method in methods if method != OURS]
    if _other_budget(config):
        raise UserError(
            "a bench goes by shares of the decoder blocks' parameters, the same for all methods; give --keep, and "
            "leave keep_of, search.constraint and budgets out (both shares are in its rows)"
        )
    if config.train.data:
        raise UserError(
            f"nothing is trained in a bench, ours included, given train.data {config.train.data!r}; leave it out, and "
            "give checkpoints of prunus compress to prunus recover"
        )
    if config.search.storage:
        raise UserError(
            "a row tells what its network took alone, and search.storage shares a search with others, given "
            f"{config.search.storage!r}; leave it out"
        )
    if config.front.objectives:
        raise UserError("a bench has no fronts; leave front.objectives out, or give it to prunus compress")
    if config.uniform and others:
        raise UserError(f"uniform is for our own search, and {others[0]} would not keep to it; leave it out")


def refuse_calibrated(texts: Sequence[str], sources: Sequence[str]) -> None:
    """Raise UserError for a test text that is calibration text too: the same file, or another one of the same bytes."""
    files = [file for source in sources for file in calibration.files_of(source)]
    for text in map(Path, texts):
        for file in files:
            if text.resolve() == file.resolve():
                raise UserError(
                    f"{str(text)!r} is test text and calibration text at once; figures on it would mean nothing"
                )
            if text.stat().st_size == file.stat().st_size and fingerprint(text) == fingerprint(file):
                raise UserError(
                    f"the test text {str(text)!r} has the same bytes as the calibration text {str(file)!r}; figures on "
                    "it would mean nothing: give another text to one of the two"
                )


def refuse_step(config: CompressConfig, verb: str) -> None:
    """Raise UserError for a verb that only runs of our own method know."""
    if config.method != OURS:
        raise UserError(
            f"this is a run of the method {config.method}, which has no error curves and no search, so `prunus {verb}` "
            "cannot go on from it; give `prunus compress` with another --keep"
        )


def refuse(baseline: Baseline, model_type: str, keeps: Sequence[float]) -> None:
    """Raise UserError for a model, or a share, that a method cannot serve."""
    for keep in keeps:
        if refusal := baseline.refusal(model_type, keep):
            raise UserError(refusal)


def compress(config: CompressConfig, out: Path, progress: Progress) -> dict[str, Any]:
    """A run directory with one checkpoint per share, and its report, as `pipeline.compress` makes them."""
    baseline = check(config)
    loaded = loading.load_configured(config, work=Work.of(config))
    refuse(baseline, str(loaded.model.config.model_type), config.keep)

    def admit(run: Run) -> None:
        _check_texts(Session.of(run, config, loaded, progress), anew=True)

    with Run.open(out, config.to_dict(), asdict(loaded.source), admit=admit) as run:
        s = Session.of(run, config, loaded, progress)
        run.require_space(len(config.keep) * costs.n_bytes(s.layout, s.whole, s.width), "the checkpoints")
        _check_texts(s)
        ids, holdout = steps.calibrate(s)
        describe.check_unseen(s, ids)
        dense = describe.measure_dense(s)
        subject = subject_of(config, s.model, ids, progress)
        chosen, notes = {}, {}
        for target in config.targets:
            chosen[target.name], notes[target.name] = _one(
                s, subject, baseline, target.name, target.value, holdout, dense
            )
        command = shlex.join(["prunus", "compress", config.model, "--out", str(out), "--config", f"{out}/config.yaml"])
        data = describe.report_data(s, None, dense, chosen, command)
        data["rival"] = {"name": baseline.name, "title": baseline.title, "paper": baseline.paper, "notes": notes}
        return {**data, "report": str(write_report(run.directory, data))}


def _check_texts(s: Session, anew: bool = False) -> None:
    """Refuse texts that cannot be calibrated on, or scored on, before anything is drawn: as a run of ours does.

    anew: the configuration is another one than the run's, so that its dense model may be scored again.
    """
    c, text = s.config.calibration, s.config.test_text
    if not s.run.done("tokens.safetensors"):
        calibration.check(c.source, c.samples + c.holdout, column=c.column)
        check_length(s.model, c.length)
    if text and (anew or not s.run.done("evaluation/dense.json")):
        describe.check_text(s)
        refuse_calibrated([text], [c.source])


def subject_of(config: CompressConfig, model: nn.Module, ids: Tensor, progress: Progress) -> Subject:
    """What a configuration gives every method to work on."""
    r = config.rival
    return Subject(
        model, ids, seed=config.seed, search_tokens=r.search_tokens, generations=r.generations, window=r.window,
        gradient_windows=r.gradients, progress=progress,
    )  # fmt: skip


def _one(
    s: Session, subject: Subject, baseline: Baseline, name: str, keep: float, holdout: Tensor, dense: Any
) -> tuple[Any, list[str]]:
    """One network of a method, measured and saved; made only where one of the two is not done."""
    made: list[Outcome] = []

    def outcome() -> Outcome:
        if not made:
            found, spent = subject.run(lambda: baseline.run(subject, keep))
            s.run.count_tokens(spent.forward_tokens)
            made.append(found)
        return made[0]

    def evaluated() -> dict[str, Any]:
        found = outcome()
        return {**figures(s, name, found, holdout), "notes": list(found.notes)}

    with s.progress(f"{baseline.name}, {name}"):
        found: Any = s.run.do("evaluate", f"evaluation/{name}.json", evaluated)
    notes = found.pop("notes")
    card, manifest = describe.card(s, name, found, dense), describe.manifest(s, s.whole, found)
    manifest = {**manifest, "subnetwork": found.pop("subnetwork"), "method": baseline.name}

    def save(model: nn.Module, path: Path) -> None:
        checkpoint.save(
            model, s.tokenizer, path, card=card, manifest=manifest, generation_config=s.generation_config, dtype=s.dtype
        )

    s.run.do(
        "extract", f"models/{name}", lambda: outcome().model, save=save, load=lambda path: nn.Identity(),
        inputs={"card": card},
    )  # fmt: skip
    return {**found, "layers": [tuple(shape) for shape in found["layers"]]}, notes


def figures(s: Session, name: str, outcome: Outcome, holdout: Tensor) -> dict[str, Any]:
    """Sizes and measured figures of one network, as `describe.figures` gives them for ours."""
    found: dict[str, Any] = {"name": name, **sizes(outcome, s.model, s.width), "subnetwork": outcome.sub.to_json()}
    model = outcome.model
    kl = kl_divergence(model, s.model, holdout.flatten().cpu(), length=holdout.shape[1], chunks=len(holdout), bos=False)
    s.run.count_tokens(2 * holdout.numel())
    found |= {"kl_nats": kl.mean_nats, "kl_se": kl.se or 0.0}
    if not math.isfinite(found["kl_nats"]):
        raise UserError(f"{name}: the network gives no finite divergence; use --dtype float32")
    found |= describe.judged(s, model)
    return found | describe.timed(s.model, model)


def sizes(outcome: Outcome, dense: nn.Module, width: int) -> dict[str, Any]:
    """What a network counts, everything that it holds included; masks by what is not zero. width: bytes of a number."""
    model, sub = outcome.model, outcome.sub
    own, whole = parameters(model), parameters(dense)
    zeros = {"blocks": 0, "all": 0}
    if own == whole:  # the dense shape: a mask, or nothing was asked
        layers = model.get_submodule(family_of(dense.config).layers)
        gone = sum(int((p == 0).sum()) for p in layers.parameters() if p.ndim == 2)
        zeros = {"blocks": gone, "all": gone}
    return {
        "kept_blocks": (own["blocks"] - zeros["blocks"]) / whole["blocks"],
        "kept_all": (own["all"] - zeros["all"]) / whole["all"],
        "parameters": own["all"],
        "n_bytes": sum(p.numel() for p in model.parameters()) * width,
        "hidden": sub.hidden,
        "layers": [(x.kv_heads, x.q_per_kv, x.mlp) for x in sub.layers],
        "uniform": not str(getattr(model.config, "model_type", "")).startswith("prunus_"),
    }


__all__ = [
    "OURS",
    "check",
    "compress",
    "figures",
    "refuse",
    "refuse_calibrated",
    "refuse_step",
    "refuse_unfair",
    "sizes",
    "subject_of",
]
