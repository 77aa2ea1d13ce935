"""Floor 3: one loop for all training: transformers' Trainer, whose step runs the passes of the sandwich rule.

A pass is a forward and a backward of one sub-network (the sandwich rule: Yu and Huang 2019, arXiv:1903.05134; for
language models Sukthanker et al. 2024, arXiv:2410.06479v1, eq. 1); the gradients of all passes add up in the
super-network's weights before one step.
What Trainer does, it does: accumulation, clipping, schedule, mixed precision, logging, checkpoints, several processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from prunus.errors import UserError
from prunus.launched import is_main
from prunus.models import costs
from prunus.models.families import Family
from prunus.models.heads import Head, head_of, summed_loss
from prunus.models.precision import multiplies
from prunus.models.slicing import activate
from prunus.searching.objective import Weights
from prunus.subnetwork import SubNetwork
from prunus.texts.instructions import IGNORED, Windows
from prunus.training import draws, states
from prunus.training.learning import TrainConfig
from prunus.training.losses import cross_entropy, divergence
from prunus.training.teaching import Teacher
from prunus.training.telling import Telling, check_installed, reporters

Draw = Callable[[random.Random], Sequence[SubNetwork | None]]  # the sub-networks of one step; None: the model as it is
LOG = "log.jsonl"
LOOKS = ("report_to", "log_every", "eval_every")  # settings that change nothing in what is trained


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a step: which sub-network, and the weights of its losses."""

    name: str
    subnetwork: SubNetwork | None  # None: the model as it is
    ce: float
    kd: float
    weight: float


@dataclass(frozen=True)
class Fitted:
    """What came of a training."""

    history: list[dict[str, float]]  # what was logged: loss, learning rate, figures of the watched sub-networks
    steps: int
    tokens: int  # tokens of all steps together, each counted once however many passes saw it; padding counts
    seconds: float
    whole: dict[str, Tensor] | None = None  # what was trained, where the model that was is in pieces now
    eased: Sequence[Mapping[str, Any]] = ()  # settings that changed on the way: step, and (before, after) of each


class Network(nn.Module):
    """A language model whose forward is a loss: what Trainer, DDP and autocast wrap."""

    accepts_loss_kwargs = True  # Trainer counts the labels of all accumulated batches for us

    def __init__(self, model: Any, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.settings = config
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # the layers, for who shards them

    def tie_weights(self) -> None:
        """For who loads weights anew."""
        self.model.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        ce: float = 1.0,
        kd: float = 0.0,
        teacher: Tensor | None = None,
        teacher_head: Head | None = None,
    ) -> dict[str, Tensor]:
        """Losses summed over the positions that carry one, and the hidden states before the head (batch, length, d).

        teacher: the teacher's hidden states for the same tokens; teacher_head turns them into its logits.
        """
        hidden: Tensor = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != IGNORED
        chosen, targets = hidden[:, :-1][wanted], labels[:, 1:][wanted]
        taught = teacher[:, :-1][wanted] if teacher is not None and kd else None
        c = self.settings

        def measure(logits: Tensor, first: int) -> Tensor:
            end = first + len(logits)
            loss = logits.new_zeros((), dtype=torch.float32)
            if ce:
                loss = loss + ce * cross_entropy(logits, targets[first:end]).sum()
            if taught is not None:
                assert teacher_head is not None
                with torch.no_grad():
                    aim = teacher_head(taught[first:end])
                loss = loss + kd * divergence(c.divergence, logits, aim, c.temperature).sum()
            return loss

        return {"loss": summed_loss(head_of(self.model), chosen, measure), "hidden": hidden.detach()}


class SandwichTrainer(Trainer):
    """Trainer whose step is a list of passes, and whose checkpoints hold what is trained.

    draw: the sub-networks of a step, a function of a seeded generator alone, so that a resumed training draws alike.
    watched: held-out windows are scored with these. teacher: signals of a model that is not trained; without one and
    with more than one pass, sub-networks learn from the full network's pass of the same step. weights: tensors that
    replace slices of the super-network in a sub-network, as `activate` takes them.
    """

    def __init__(
        self,
        network: Network,
        args: TrainingArguments,
        *,
        family: Family,
        draw: Draw | None,
        watched: Mapping[str, SubNetwork | None],
        teacher: Teacher | None,
        holdout: Windows | None,
        weights: Weights | None = None,
        **more: Any,
    ) -> None:
        super().__init__(model=network, args=args, data_collator=_stack, **more)
        self.network, self.family, self.draw = network, family, draw
        self.watched, self.teacher, self.holdout, self.weights = watched, teacher, holdout, weights
        self.layout = costs.layout(network.model, family) if draw else None  # while no sub-network is active
        self._micro = (-1, 0)  # the step, and the batches of it that were seen
        self._earlier, self._start = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """What the training took so far, before it was resumed too."""
        return self._earlier + time.monotonic() - self._start

    # ------------------------------------------------------------------------------------------------------ a step

    def plan(self) -> list[Pass]:
        """The passes of the batch that comes next: a function of seed, step and place in the step."""
        c = self.network.settings
        step, n = self.state.global_step, self._micro[1] + 1 if self._micro[0] == self.state.global_step else 0
        self._micro = step, n
        rank = self.args.process_index
        n = n * self.args.world_size + rank  # several processes draw what one with more accumulation would draw
        if self.draw is None:
            return [Pass("the network", None, c.ce if self.teacher else 1.0, c.kd if self.teacher else 0.0, 1.0)]
        subs = self.draw(random.Random(f"{self.args.seed} {step} {n}"))
        taught = self.teacher is not None
        passes = []
        for k, sub in enumerate(subs):
            first = k == 0 and sub is None and not taught
            alone = first or (not taught and subs[0] is not None)  # nobody to learn from
            name = "the full network" if sub is None else f"sub-network {k} of the step"
            ce, kd = (1.0, 0.0) if alone else (c.ce, c.kd)
            passes.append(Pass(name, sub, ce, kd, 1.0 / len(subs)))
        return passes

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """All passes of one batch; gradients are sums over labels, divided by the labels of the whole step."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        ids, labels = inputs["input_ids"], inputs["labels"]
        scale = self.accelerator.num_processes / max(1.0, float(num_items_in_batch or (labels != IGNORED).sum()))
        head = head_of(self.network.model).whole()  # before anything is activated: the full network's
        taught, taught_head = None, head
        if self.teacher is not None:
            taught, taught_head = self.teacher.hidden(inputs["index"], ids), self.teacher.head
        passes, total = self.plan(), torch.zeros((), device=ids.device)
        for k, one in enumerate(passes):
            waits = contextlib.nullcontext() if k == len(passes) - 1 else self._adding_up(model)
            with waits, self.active(one.subnetwork):
                out = model(
                    input_ids=ids, labels=labels, ce=one.ce, kd=one.kd, teacher=taught, teacher_head=taught_head
                )
                loss = out["loss"] * (scale * one.weight)
                self._refuse_nan(loss, one)
                # the loss is divided by the labels of the whole step already, and DeepSpeed would divide it again
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
            if one.subnetwork is None and self.teacher is None:
                taught = out["hidden"]
            total += loss.detach()
        return total

    @contextlib.contextmanager
    def _adding_up(self, model: nn.Module) -> Iterator[None]:
        """Inside the block gradients stay with their process, and DeepSpeed, which steps in `backward`, does not."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    @contextlib.contextmanager
    def active(self, sub: SubNetwork | None) -> Iterator[None]:
        """The model computes as a sub-network inside the block, backward included."""
        if sub is None:
            yield
            return
        override = self.weights(sub) if self.weights is not None else None
        with activate(self.network.model, self.family, sub, override):
            yield

    def _refuse_nan(self, loss: Tensor, one: Pass) -> None:
        """All processes stop together where the loss of any is not finite, and each says whose it was."""
        bad, several = (~torch.isfinite(loss.detach())).float(), self.args.world_size > 1
        if several:
            dist.all_reduce(bad)
        if not bad:
            return
        value, sub = float(loss.detach()), one.subnetwork
        width = f" ({draws.in_brief(sub, self.layout)})" if sub and self.layout else ""
        own = None if math.isfinite(value) else f"{value:g} at step {self.state.global_step + 1}, in {one.name}{width}"
        found = [own] * self.args.world_size
        if several:
            dist.all_gather_object(found, own)
        rank, words = next((k, words) for k, words in enumerate(found) if words)
        self._stop(f"the loss is {words}{f', in process {rank} of {len(found)}' if several else ''}")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, asked before the optimiser's step; a finite loss may have a gradient that is not."""
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else 0.0 if norm is None else norm)
        if not math.isfinite(value) and self.accelerator.mixed_precision != "fp16":  # whose scaler skips such steps
            self._stop(f"the norm of the gradient is {value:g} at step {self.state.global_step + 1}")
        return norm

    def _stop(self, what: str) -> None:
        kept = states.last(Path(str(self.args.output_dir)))
        where = f"the last good state is {str(kept)!r}" if kept else "no state had been saved yet"
        raise UserError(
            f"{what}; {where}. Give a lower --lr, a longer warm-up (--set train.warmup=NUMBER) or --precision float32: "
            "the same prunus recover with these, or prunus train RUN with them, goes on from that state"
        )

    # ------------------------------------------------------------------------------------------------- its checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what is trained: adapters, or all weights in their master precision. All processes come here."""
        weights = states.trained(self.network.model)
        if bad := next((name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())), None):
            self._stop(f"{bad} is not finite after step {self.state.global_step}")
        if self.args.should_save:
            states.save(weights, Path(str(output_dir or self.args.output_dir)), self.seconds)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._earlier = states.load(self.network.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, but with the learning rate of now: a state holds the one that it was trained with."""
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = self.lr_scheduler
        if checkpoint is None or not hasattr(scheduler, "lr_lambdas"):
            return
        scheduler.base_lrs = [self.args.learning_rate] * len(scheduler.base_lrs)
        for group, shape in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = self.args.learning_rate
            group["lr"] = self.args.learning_rate * shape(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]  # what is logged

    # -------------------------------------------------------------------------------------------------- its evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Nats per label of every watched sub-network on the held-out windows, and its distance from the teacher."""
        metrics: dict[str, float] = {}
        for name, sub in self.watched.items():
            nats = held_out(self, sub)
            metrics |= {f"eval_{name}_{key}": value for key, value in nats.items()}
        metrics["eval_loss"] = sum(v for k, v in metrics.items() if k.endswith("_nats")) / max(1, len(self.watched))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def held_out(trainer: SandwichTrainer, sub: SubNetwork | None) -> dict[str, float]:
    """Cross entropy and, where there is a teacher outside, divergence from it, per label of the held-out windows."""
    windows, network = trainer.holdout, trainer.network
    assert windows is not None
    teacher, batch = trainer.teacher, trainer.args.per_device_eval_batch_size
    training, sums = network.training, {"nats": 0.0, "kl": 0.0}
    network.eval()
    with trainer.active(sub):
        for first in range(0, len(windows), batch):
            ids = windows.ids[first : first + batch].to(trainer.args.device)
            labels = windows.labels[first : first + batch].to(trainer.args.device)
            sums["nats"] += float(network(input_ids=ids, labels=labels)["loss"])
            if teacher is not None:
                taught = teacher.compute(ids)
                out = network(input_ids=ids, labels=labels, ce=0.0, kd=1.0, teacher=taught, teacher_head=teacher.head)
                sums["kl"] += float(out["loss"])
    network.train(training)
    if teacher is None:
        del sums["kl"]
    return {key: value / windows.n_labels for key, value in sums.items()}


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Windows as Trainer reads them; each knows its number, by which a teacher's signal is found again."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.windows.ids[i], "labels": self.windows.labels[i], "index": i}


# ------------------------------------------------------------------------------------------------------------ fitting


@dataclass
class Job:
    """What is trained on what; `fit` runs it."""

    model: Any  # trained in place
    family: Family
    windows: Windows
    config: TrainConfig
    out: Path  # where the states of the training are kept
    seed: int = 0
    draw: Draw | None = None
    watched: Mapping[str, SubNetwork | None] = field(default_factory=lambda: {"network": None})
    teacher: Teacher | None = None
    holdout: Windows | None = None
    weights: Weights | None = None  # of a sub-network, where they are not plain slices
    advance: Callable[[int], None] = lambda n: None
    belongs_to: Mapping[str, Any] = field(default_factory=dict)  # what a resumed training must agree in


def fit(job: Job) -> Fitted:
    """Train the model (**in place**), going on from the last whole state in `job.out` where there is one.

    Raises UserError for a loss or gradient that is not finite, a state of another training, and missing packages.
    """
    config = job.config
    args = arguments(job)
    network = Network(job.model, config)
    buffers = {name: buffer.clone() for name, buffer in job.model.named_buffers()}
    if config.checkpointing:
        job.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    telling = Telling(job.advance, job.out / LOG, job.model, buffers)
    trainer = SandwichTrainer(
        network, args, family=job.family, draw=job.draw, watched=job.watched, teacher=job.teacher, holdout=job.holdout,
        weights=job.weights, train_dataset=Rows(job.windows), eval_dataset=Rows(job.holdout) if job.holdout else None,
        callbacks=[telling],
    )  # fmt: skip
    states.refuse_sharded(trainer.accelerator.state, slices=trainer.draw is not None or trainer.weights is not None)
    for callback in (*trainer.callback_handler.callbacks,):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    last, total = states.last(job.out), trainer_steps(job, args)
    done = last is not None and states.step_of(last) >= total
    eased = states.remember(job.out, identity(job, args.world_size), done=done, write=is_main())
    if not done:
        states.refuse_full_disk(job.out, sum(p.numel() for p in job.model.parameters() if p.requires_grad))
    if last is not None and done:
        seconds = states.load(job.model, last)
        history = list(json.loads((last / states.WHOLE).read_text())["log_history"])
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        history, seconds = list(trainer.state.log_history), trainer.seconds
    if job.holdout is not None:
        history.append({**trainer.evaluate(), "step": total})
    if config.checkpointing:
        job.model.gradient_checkpointing_disable()
    telling.restore()
    job.model.eval()
    whole = states.trained(job.model) if states.is_sharded(job.model) else None
    return Fitted(history, total, tokens_seen(job, args, total), seconds, whole, eased)


def tokens_seen(job: Job, args: TrainingArguments, steps: int) -> int:
    """Tokens of so many steps of all processes; the last step of an epoch may have fewer windows than the others."""
    n, batch = len(job.windows), args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    epochs, rest = divmod(steps, _epoch_steps(job, args))
    return int((epochs * n + min(n, rest * batch)) * job.windows.ids.shape[1])


def trainer_steps(job: Job, args: TrainingArguments) -> int:
    """Steps of the whole training, as Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    return int(-(-args.num_train_epochs * _epoch_steps(job, args) // 1))


def _epoch_steps(job: Job, args: TrainingArguments) -> int:
    batches = -(-len(job.windows) // (args.per_device_train_batch_size * args.world_size))
    return max(1, int(-(-batches // args.gradient_accumulation_steps)))


def arguments(job: Job) -> TrainingArguments:
    """Trainer's settings for ours; what the launcher (torchrun, accelerate) says is read by Trainer itself."""
    c = job.config
    check_installed(c.report_to)
    if c.precision == "float32":  # whatever the launcher's configuration says
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    device = next(job.model.parameters()).device
    full = c.rank == 0
    args = TrainingArguments(
        output_dir=str(job.out),
        per_device_train_batch_size=c.batch,
        per_device_eval_batch_size=c.batch,
        gradient_accumulation_steps=c.accumulation,
        num_train_epochs=c.epochs,
        max_steps=c.steps or -1,
        learning_rate=c.lr if c.lr is not None else (1e-4 if full else 5e-4),
        lr_scheduler_type="cosine",
        warmup_steps=c.warmup,
        weight_decay=c.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=c.clip,
        bf16=c.precision == "bfloat16" or (c.precision == "auto" and multiplies(torch.bfloat16, device)),
        use_cpu=device.type == "cpu",
        logging_steps=c.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=c.save_every,
        save_total_limit=2,
        eval_strategy="steps" if c.eval_every and job.holdout is not None else "no",
        eval_steps=c.eval_every or None,
        eval_on_start=job.holdout is not None,
        seed=job.seed,
        report_to=reporters(c.report_to),
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        ddp_find_unused_parameters=True,  # a pass may leave out layers
        average_tokens_across_devices=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    if device.type == "cuda" and device != args.device:
        raise UserError(
            f"the model is on {device}, but this process trains on {args.device}; give --device cuda, and choose among "
            "several devices by the variable CUDA_VISIBLE_DEVICES"
        )
    if args.n_gpu > 1:
        args._n_gpu = 1  # no nn.DataParallel: its copies of a model know nothing of the active sub-network
    return args


def identity(job: Job, processes: int) -> dict[str, Any]:
    """What makes a training this one, as plain data: models, text, seed and settings."""
    note = {key: value for key, value in vars(job.config).items() if key not in LOOKS}
    note |= {"processes": processes, "windows": states.digest(job.windows), "seed": job.seed, **job.belongs_to}
    found: dict[str, Any] = json.loads(json.dumps(note))
    return found


__all__ = ["Draw", "Fitted", "Job", "Network", "Pass", "SandwichTrainer", "fit"]
