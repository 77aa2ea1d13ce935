"""Floor 5: the verb `recover`: one network learns from the model that it was cut out of, by distillation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunus import machine
from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.launched import is_main
from prunus.models import checkpoint, loading
from prunus.models.families import family_of
from prunus.models.loading import Loaded
from prunus.models.memory import NOTHING, Work
from prunus.progress import Progress, silent
from prunus.recording.lock import acquire
from prunus.texts.instructions import Windows, windows_of
from prunus.training import adapters, states
from prunus.training.loop import Fitted, Job, arguments, fit, identity, trainer_steps
from prunus.training.teaching import Teacher


def recover(
    config: CompressConfig, teacher: str | None, out: str | Path, progress: Progress = silent
) -> dict[str, Any]:
    """Train the checkpoint that `config.model` names on `config.train.data`, and write the result to `out`.

    teacher: the model to imitate (the one that the checkpoint came from, usually); None: cross entropy alone.
    The states of the training lie in `<out>.training` until it is done: the same call goes on after a stop, and does
    nothing once the result is there.
    Returns plain data: tokens, seconds, nats per token on held-out windows before and after. Raises UserError for what
    the user can mend, before any training.
    """
    target, c = Path(out), config.train
    if target.name in ("", ".."):
        target = target.resolve()
    if c.data is None:
        raise UserError("no training data were named; give --train FILE (.jsonl rows or text)")
    c.refuse_idle(one=True, teacher=teacher is not None)
    checkpoint.refuse_foreign(target.absolute())
    work = Work(samples=1, length=1, train=c, beside=int(teacher is not None), steps=("train",))
    student = _load(config, config.model, work)
    positions = getattr(student.model.config, "max_position_embeddings", None)
    windows, holdout = windows_of(c, student.tokenizer, positions, config.seed)
    dense = _load(config, teacher) if teacher else None
    if dense is not None:
        _refuse_unlike(student, dense)
    with _alone(target.with_name(f"{target.name}.training")) as folder:
        return _recover(config, teacher, target, folder, student, dense, (windows, holdout), progress)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """One command at a time trains into a folder, all processes of a launch together; UserError for another one."""
    lock, done = acquire(folder) if is_main() else None, False
    try:
        yield folder
        done = True
    finally:
        if lock is not None:
            if done or not (folder / states.RECORD).exists():  # all of it is saved, or nothing was trained
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()  # last: what another command begins there is not ours to delete


def _recover(
    config: CompressConfig,
    teacher: str | None,
    target: Path,
    folder: Path,
    student: Loaded,
    dense: Loaded | None,
    windows: tuple[Windows, Windows | None],
    progress: Progress,
) -> dict[str, Any]:
    """Go on with the training whose states lie in `folder`, or find its result in `target`."""
    _make_trainable(student.model, config)
    taught = Teacher(dense.model, folder, windows[0].ids, dense.source.sha256) if dense is not None else None
    job = Job(
        student.model, family_of(student.model.config), windows[0], config.train, folder, seed=config.seed,
        teacher=taught, holdout=windows[1],
        belongs_to={"checkpoint": student.source.sha256, "teacher": dense.source.sha256 if dense else None},
    )  # fmt: skip
    args = arguments(job)
    own = identity(job, args.world_size)
    if (done := _finished(target, own)) is not None:
        return {**done, "checkpoint": str(target)}
    with progress("training", trainer_steps(job, args)) as advance:
        job.advance = advance
        fitted = fit(job)
    found = {**_figures(job, fitted, config, teacher), "identity": own}
    if is_main():
        if fitted.whole is not None:  # the model is in pieces, and hooks would put it back into them
            student = _load(config, config.model)
            _make_trainable(student.model, config)
            states.put(student.model, fitted.whole)
        adapters.merge(student.model)
        _save(student, target, found)
    return {**found, "checkpoint": str(target)}


def _make_trainable(model: Any, config: CompressConfig) -> None:
    """Adapters, or all weights as float32 masters (**in place**)."""
    c = config.train
    if c.rank:
        adapters.attach(
            model, family_of(model.config), rank=c.rank, alpha=c.alpha, dropout=c.dropout, adapted=c.adapt,
            seed=config.seed,
        )  # fmt: skip
    else:
        model.float()


def _finished(target: Path, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures of the same training, where it is done already; UserError where `target` holds another network."""
    if not (target / checkpoint.MANIFEST).is_file():
        return None
    found: dict[str, Any] = checkpoint.verify(target).get("recovery", {})
    if found.get("identity") == own:
        return found
    raise UserError(f"{str(target)!r} holds another network already; choose another --out, or delete it")


def _load(config: CompressConfig, model: str, work: Work = NOTHING) -> Loaded:
    return loading.load(
        model, revision=config.revision if model == config.model else None, dtype=config.dtype,
        device=config.device, trust_remote_code=config.trust_remote_code, compress=False, work=work,
    )  # fmt: skip


def _refuse_unlike(student: Loaded, teacher: Loaded) -> None:
    sizes = [int(one.model.config.vocab_size) for one in (student, teacher)]
    probe = "The quick brown fox, 12 times."
    if sizes[0] != sizes[1] or student.tokenizer(probe)["input_ids"] != teacher.tokenizer(probe)["input_ids"]:
        raise UserError(
            f"the teacher {teacher.source.id!r} has another vocabulary ({sizes[1]} tokens, the checkpoint's "
            f"{sizes[0]}); give the model that the checkpoint was made from"
        )


def _figures(job: Job, fitted: Fitted, config: CompressConfig, teacher: str | None) -> dict[str, Any]:
    scored = [row for row in fitted.history if "eval_loss" in row]
    names = {"eval_network_nats": "nats", "eval_network_kl": "kl_nats"}
    ends = {
        when: {short: row[long] for long, short in names.items() if long in row}
        for when, row in zip(("before", "after"), (scored[0], scored[-1]), strict=True)
    } if scored else {}  # fmt: skip
    return {
        "model": config.model,
        "teacher": teacher,
        "data": Path(str(config.train.data)).name,
        "windows": len(job.windows),
        "truncated_rows": job.windows.truncated,
        "skipped_rows": job.windows.skipped,
        "steps": fitted.steps,
        "tokens": fitted.tokens,
        "seconds": fitted.seconds,
        **({"eased": fitted.eased} if fitted.eased else {}),
        "held_out": ends,
        "history": fitted.history,
        "versions": machine.versions(*machine.TRAINING),
        "settings": {key: value for key, value in vars(job.config).items() if key != "data"},
    }


def _save(student: Loaded, target: Path, found: Mapping[str, Any]) -> None:
    origin: dict[str, Any] = {}
    path = Path(str(student.source.id)) / checkpoint.MANIFEST
    if path.is_file():
        origin = json.loads(path.read_text(encoding="utf-8"))
        origin.pop("files", None)
        origin.pop("figures", None)  # they are the untrained network's
    manifest = {**origin, "recovery": dict(found), "environment": machine.environment()}
    checkpoint.save(
        student.model, student.tokenizer, target, card=_card(found, origin), manifest=manifest,
        generation_config=student.generation_config, dtype=student.dtype,
    )  # fmt: skip


def _card(found: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    base = origin.get("source", {}).get("id") or found["model"]
    titles = {"nats": "nats per token", "kl_nats": "divergence from the teacher"}
    shown = [key for key in titles if all(key in ends for ends in found["held_out"].values())]
    rows = [[name, *(f"{ends[key]:.4f}" for key in shown)] for name, ends in found["held_out"].items()]
    head = [["held-out windows", *(titles[key] for key in shown)], ["---", *("---:" for _ in shown)]]
    scores = "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows]) if rows else ""
    name, cut = Path(str(base)).name, "subnetwork" in origin
    taught = f"it learnt from {Path(str(found['teacher'])).name}" if found["teacher"] else "without a teacher"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [prunus, compressed]
---
# {f"A smaller network inside {name}" if cut else name}, trained further

{"Cut out by Prunus and then trained" if cut else "Trained by Prunus"} on {found["tokens"]:,} tokens of \
{found["data"]}; {taught}.

{scores}

Load it with `AutoModelForCausalLM.from_pretrained`; where its layers differ in width, with
`trust_remote_code=True`. The licence is that of the original model, and that of the training data may matter.
"""


__all__ = ["recover"]
