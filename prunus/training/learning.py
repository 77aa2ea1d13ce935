"""Floor 0: the settings of training, a section of `config.py`'s configuration; no torch."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from prunus.errors import UserError
from prunus.setting import ANYWHERE, Section, declared, setting

ADAPTERS = ("alpha", "dropout", "adapt")
DRAWN = ("sampler", "drawn", "bins", "draws", "least", "reformed", "trials")
DISTILLED = ("ce", "kd", "divergence", "temperature")
UNREAD = {  # what a sampler does not read
    "random": ("bins", "draws", "least", "trials"),
    "grid": ("draws", "least", "trials"),
    "grid-params": ("draws",),
}
ROWS = (".json", ".jsonl", ".ndjson")  # files of rows; others are one text
ADAPTED = {"linear": ("attention", "mlp"), "all": ("attention", "mlp", "embedding", "head")}  # short for several


@dataclass(frozen=True)
class TrainConfig(Section):
    """How a super-network, or one network, is trained; nothing is, unless training data are named."""

    prefix: ClassVar[str] = "train."
    data: str | None = setting(
        None, "training data: .json or .jsonl rows (Alpaca, `messages`, `text`) or a text file; never test text",
        step="train", flag="train",
    )  # fmt: skip
    column: str | None = setting(None, "field of the rows that holds the text", step="train")
    length: int = setting(512, "tokens in a training window", step="train", flag="window", low=2)
    packing: bool = setting(True, "rows follow one another in the windows; else each has its own", step="train")
    holdout: int = setting(16, "windows that are not trained on, to watch the training", step="train", low=0)
    space: Literal[
        "llama_joint", "llama_heads", "llama", "llama2", "hw_gpt_bench", "small", "medium", "groups", "layers"
    ] = setting("groups", "widths that sub-networks may take while training", step="train", flag="space")
    strategy: Literal["standard", "random", "sandwich", "sandwich-grid"] = setting(
        "sandwich",
        "networks of a step: standard (the full one), random (one drawn), sandwich (full, drawn ones, smallest), "
        "sandwich-grid (full and drawn ones)",
        step="train",
        flag="strategy",
    )
    sampler: Literal[
        "random", "grid", "grid-params", "calibrated-magnitude", "calibrated-ppl", "calibrated-kl", "calibrated"
    ] = setting(
        "calibrated-kl", "how sub-networks are drawn; calibrated: short for the default", step="train", flag="sampler"
    )
    sort: bool = setting(
        True, "sub-networks keep the most important members; else, for comparison, the first ones", step="train"
    )
    drawn: int | None = setting(
        None, "sub-networks drawn in each step; `none`: 2, and 3 for sandwich-grid", step="train", low=1
    )
    bins: int = setting(22, "bins of parameter counts", step="train", low=1)
    draws: int = setting(10, "candidates for each bin, the best of which is trained", step="train", low=1)
    least: float = setting(
        0.4, "the smallest networks of the bins, as a share of all parameters; 0: the smallest of the space",
        step="train", low=0, high=0.99,
    )  # fmt: skip
    reformed: bool = setting(
        True, "while training, too, sub-networks run with the reformed weights that they would be shipped with",
        step="train",
    )  # fmt: skip
    trials: int = setting(
        1000, "draws for each bin, trials x bins in all; bins that are not full then stay so, or empty", step="train",
        low=1,
    )  # fmt: skip
    teacher: Literal["in-place", "dense"] = setting(
        "in-place", "what sub-networks imitate: the full network as it is in that step, or the model before training",
        step="train", flag="teacher",
    )  # fmt: skip
    ce: float = setting(0.0, "weight of the cross entropy beside a teacher", step="train", flag="ce", low=0)
    kd: float = setting(1.0, "weight of their divergence from the teacher", step="train", flag="kd", low=0)
    divergence: Literal["forward_kl", "reverse_kl", "js"] = setting(
        "forward_kl", "divergence of teacher and network", step="train", flag="divergence"
    )
    temperature: float = setting(1.0, "softening of both in the divergence", step="train", above=0)
    epochs: float = setting(1.0, "times that the data are seen", step="train", flag="epochs", above=0)
    steps: int | None = setting(None, "optimiser steps instead of epochs", step="train", flag="steps", low=1)
    batch: int = setting(8, "windows in one forward of one process", step="train", flag="micro-batch", low=1)
    accumulation: int = setting(1, "forwards that one step adds up", step="train", flag="accumulation", low=1)
    lr: float | None = setting(
        None, "highest learning rate; `none`: 1e-4 for all weights, 5e-4 for adapters", step="train", flag="lr", above=0
    )
    warmup: float = setting(0.05, "warm-up: a share of the steps, or (from 1) their number", step="train", low=0)
    weight_decay: float = setting(0.0, "weight decay of AdamW", step="train", low=0)
    clip: float = setting(1.0, "greatest norm of a gradient; 0: any", step="train", low=0)
    rank: int = setting(0, "rank of LoRA adapters; 0: all weights are trained", step="train", flag="rank", low=0)
    alpha: float | None = setting(None, "adapters are scaled by alpha / rank; `none`: 2 x rank", step="train", above=0)
    dropout: float = setting(0.0, "dropout of adapters", step="train", low=0, high=0.99)
    adapt: str = setting(
        "linear",
        "matrices that get adapters, one or several of attention, mlp, embedding, head; linear: the first two, all",
        step="train",
        flag="adapt",
    )
    precision: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        "of matrix products (auto: bfloat16 where the device multiplies it); what is trained is float32",
        step="train",
        flag="precision",
    )
    checkpointing: bool = setting(False, "forget activations and compute them again: less memory", step="train")
    save_every: int = setting(
        50, "steps between two states from which training goes on; one process also saves every ten minutes",
        step="train", low=1,
    )  # fmt: skip
    eval_every: int = setting(0, "steps between two looks at the held-out windows; 0: none", step=ANYWHERE, low=0)
    log_every: int = setting(10, "steps between two lines of the log", step=ANYWHERE, low=1)
    report_to: str = setting("none", "where Trainer logs to: tensorboard, wandb, mlflow, ... or none", step=ANYWHERE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler == "calibrated":
            object.__setattr__(self, "sampler", "calibrated-kl")
        adapted(self.adapt)
        if not self.ce and not self.kd:
            raise UserError(
                "train.ce and train.kd are both 0, so a network with a teacher would learn nothing; give --ce or --kd"
            )

    @property
    def n_drawn(self) -> int:
        """Sub-networks that are drawn in each step of a sandwich."""
        return self.drawn or (3 if self.strategy == "sandwich-grid" else 2)

    def refuse_idle(self, *, one: bool = False, teacher: bool = True, asked: Container[str] | None = None) -> None:
        """Raise UserError for settings that were given and would change nothing.

        one: a single network is trained (`recover`), by a teacher or by the text alone. asked: the dotted keys that
        were given now, where others stand as they were; None: all that are not their defaults.
        """
        whole = {known.key: known for known in declared(TrainConfig) if known.key != "data"}
        given = [
            name
            for name, known in whole.items()
            if getattr(self, name) != known.default and (asked is None or self.prefix + name in asked)
        ]

        def refuse(names: Container[str], why: str, instead: str) -> None:
            if idle := [whole[name] for name in given if name in names]:
                named = ", ".join(f"--{known.flag}" if known.flag else f"train.{known.key}" for known in idle)
                raise UserError(f"{named} would change nothing: {why}; {instead}, or leave it out")

        if not self.data:
            refuse(whole, "nothing is trained", "give --train FILE")
        if not self.rank:
            refuse(ADAPTERS, "without a rank all weights are trained, and no adapters", "give --rank 32")
        if one:
            refuse((*DRAWN, "strategy", "space", "sort", "teacher"), "it is about sub-networks, and one network is "
                   "trained", "train a run's super-network")  # fmt: skip
        elif self.strategy == "standard":
            refuse(DRAWN, "--strategy standard trains the full network alone", "take another strategy")
        else:
            if self.strategy == "random":
                refuse(("drawn",), "--strategy random draws one network in each step", "take a sandwich")
            refuse(UNREAD.get(self.sampler, ()), f"--sampler {self.sampler} does not read it", "take another sampler")
        if not one and self.strategy in ("standard", "random"):  # no full network runs beside the one that learns
            teacher = self.teacher == "dense"
        if not teacher:
            refuse(DISTILLED, "nobody teaches, so that the cross entropy is all there is", "name a --teacher")
        if not self.holdout:
            refuse(("eval_every",), "no window is held out", "give train.holdout")
        if self.data and Path(self.data).suffix.lower() not in ROWS:
            refuse(("column", "packing"), f"{Path(self.data).name} is one text without rows", "give .json or .jsonl")


def adapted(names: str) -> tuple[str, ...]:
    """What gets adapters, of attention, mlp, embedding and head; raises UserError for other names."""
    asked = names.replace(",", " ").split()
    if not asked or not {*asked} <= {*ADAPTED, *ADAPTED["all"]}:
        raise UserError(
            f"train.adapt is one or several of {', '.join(ADAPTED['all'])}, or is short for several: "
            f"{', '.join(ADAPTED)}; given {names!r}"
        )
    parts = {part for name in asked for part in ADAPTED.get(name, (name,))}
    return tuple(part for part in ADAPTED["all"] if part in parts)
