"""Floor 2: whether a model and the work on it fit, estimated before anything is read."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.models.families import dims, family_of
from prunus.models.precision import multiplies
from prunus.training.learning import TrainConfig

STEPS = ("score", "train", "reform", "search", "extract", "evaluate")
MARGIN = 1.1  # allocators round up, and libraries hold buffers


@dataclass(frozen=True)
class Work:
    """What a run does with a model, as far as its memory goes; by default nothing: the model is loaded."""

    samples: int = 0  # calibration windows, those held out included
    length: int = 0  # tokens in each
    ours: bool = True  # False: a rival's method, which takes a copy of the model
    curvature: bool = False  # second moments of the gradients are taken
    sequential: int = 0  # windows of the sequential pass; 0: there is none
    keep: float = 0.0  # the largest share of the blocks that a network keeps
    train: TrainConfig | None = None  # of the super-network; None: nothing is trained
    beside: int = 0  # copies of the whole model that stay beside it
    steps: tuple[str, ...] = STEPS  # those that are still to be done

    @classmethod
    def of(cls, config: CompressConfig, steps: tuple[str, ...] = STEPS) -> Work:
        """The work of these steps of `compress`."""
        c, r, samples = config.calibration, config.reform, config.calibration.samples + config.calibration.holdout
        keep = max((target.value if target.kind == "keep" else 1.0 for target in config.targets), default=1.0)
        if config.method != "prunus":
            return cls(samples, c.length, ours=False, keep=keep, steps=steps)
        windows = min(c.samples, r.sequential_samples or c.samples) if r.sequential and r.method != "none" else 0
        train = config.train if config.train.data else None
        return cls(samples, c.length, curvature=r.fisher > 0, sequential=windows, keep=keep, train=train, steps=steps)


NOTHING = Work()


def parameter_count(config: Any) -> int:
    """Parameters of the model that a configuration describes, tied ones once; nothing is allocated."""
    return sum(parameter.numel() for parameter in _described(config).parameters())  # a shared one comes once


def _described(config: Any) -> nn.Module:
    with torch.device("meta"), no_init_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
    model.tie_weights()  # type: ignore[operator]
    return model


def memory_needs(config: Any, dtype: torch.dtype, work: Work) -> dict[str, int]:
    """Bytes that each step of a run needs beside the weights, at its worst moment; dtype: what the work is done in.

    Counted is what grows with the model: states of all windows that travel through the layers, one layer's Gram
    matrices and their factors, the curvature of all layers, logits, the optimiser, and the weights of one network that
    is refitted or extracted. What comes true is in benchmarks/results/memory_small.json.
    """
    if not work.samples:
        return {}
    d, size, model = _widest(config), dtype.itemsize, _described(config)
    n, hidden, vocab = int(config.num_hidden_layers), d["hidden"], d["vocab"]
    inner = d["kv_heads"] * d["q_per_kv"] * d["head_dim"]
    blocks = sum(p.numel() for p in model.get_submodule(family_of(config).layers).parameters())
    everything = sum(p.numel() for p in model.parameters())
    refitted, writers = size * blocks * work.keep, size * n * hidden * (inner + d["mlp"]) * work.keep

    saved = n * size * (12 * hidden + 2 * inner + 5 * d["mlp"])  # for a token's gradients
    curvature = 2 * 4 * n * hidden**2 if work.curvature else 0
    grams, square = 4 * (d["mlp"] ** 2 + inner**2), 4 * max(d["mlp"], inner) ** 2
    carried = work.samples * work.length * hidden * size
    need: dict[str, float] = {
        "evaluate": (2 if work.ours else 1) * refitted + size * (everything - blocks + 1024 * vocab)
    }
    if work.ours:
        window = min(work.length, 512) * (saved + vocab * (size + 16)) if work.curvature else 0
        need["score"] = curvature + max(carried + grams + 3 * square, window)
        judged = 2 * 256 * vocab * 2 * size + 5 * 4 * 2**24  # logits of the positions that a divergence is taken at
        need["reform"] = curvature + 2 * grams + 3 * square + judged
        need["search"] = 2 * grams + 3 * square + judged + writers + min(512 << 20, writers)
    if work.sequential:
        states = work.sequential * work.length * (8 * hidden + size * (6 * hidden + d["mlp"]))
        need["extract"] = 1.5 * refitted + states + 4 * 128 * vocab * size + grams + 3 * square
    if work.train is not None:
        t = work.train
        learnt = everything if not t.rank else t.rank * n * (8 * hidden + 4 * inner + 3 * d["mlp"])
        need["train"] = learnt * (16 if t.rank else 16 - size) + (everything * size if t.teacher == "dense" else 0)
        need["train"] += t.batch * t.length * saved / (n if t.checkpointing else 1)
        need["train"] += 2 * size * min(t.batch * t.length * vocab, 2**29)  # one group of logits (`models.heads`)
    copies = (work.beside + (not work.ours)) * everything * size
    return {step: round(MARGIN * need[step]) + copies for step in STEPS if step in need and step in work.steps}


def _widest(config: Any) -> dict[str, int]:
    """Every dimension, in the widest layer where layers differ."""
    n, ragged = int(config.num_hidden_layers), str(config.model_type).startswith("prunus_")
    layers = [dims(config.per_layer_config[i]) for i in range(n)] if ragged else [dims(config)]
    return {name: max(one[name] for one in layers) for name in layers[0]}


def memory_need(config: Any, dtype: torch.dtype, work: Work = NOTHING) -> int:
    """Bytes for the weights and the most that any step of the work needs beside them."""
    return parameter_count(config) * dtype.itemsize + max(memory_needs(config, dtype, work).values(), default=0)


def available(device: str = "cpu") -> int | None:
    """Bytes that can still be had on a device, a container's limit included; None where the system does not say."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return None
        place = torch.device(device)
        kept = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)  # freed, and still PyTorch's
        return int(torch.cuda.mem_get_info(place)[0]) + kept
    if device != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *(limit - used for limit, used in _containers())])


def _containers() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of the control group that this process is in (version 2, then 1), where it has a limit.

    Pages of files can be taken back at any time, so they do not count as used.
    """
    both = (
        ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for folder, limit, used, prefix in both:
        try:
            group = Path(folder)
            most, now = int((group / limit).read_text()), int((group / used).read_text())
            pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield most, now - sum(int(pages[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        except (OSError, KeyError, ValueError):  # no container of that version, or one without a limit ("max")
            continue


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc keeps what lies between blocks in use).

    Work on layers frees thousands of tensors of some megabytes, and without this a run's peak is what they once were.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl
        if trim is not None:
            trim(0)


def refuse_too_large(config: Any, dtype: torch.dtype, device: str = "cpu", work: Work = NOTHING) -> None:
    """Raise UserError where the estimate exceeds what is free, saying both and what would help."""
    free = available(device)
    if free is None:
        return
    weights, needs = parameter_count(config) * dtype.itemsize, memory_needs(config, dtype, work)
    step = max(needs, key=lambda name: needs[name], default="")
    need = weights + needs.get(step, 0)
    if need <= free:
        return
    advice, half = [], torch.bfloat16
    if dtype == torch.float32 and multiplies(half, device) and memory_need(config, half, work) <= free:
        advice.append("--dtype bfloat16")
    if weights < free and (step == "extract" or (step == "score" and work.curvature)):
        advice.append("fewer or shorter calibration windows")
        advice.append("--set reform." + ("sequential=false" if step == "extract" else "fisher=0"))
    if weights < free and step == "train" and work.train is not None:
        advice += ["a smaller --micro-batch or --window", "--set train.checkpointing=true"]
        advice += [] if work.train.rank else ["--rank 32"]
    where = f" and {needs[step] / 1e9:.1f} GB for the step {step}" if step else ""
    raise UserError(
        f"not enough memory on {device}: this model needs about {need / 1e9:.1f} GB in {str(dtype).rpartition('.')[2]} "
        f"({weights / 1e9:.1f} GB of weights{where}) and {free / 1e9:.1f} GB are free; the largest that fits has about "
        f"{free / need * weights / dtype.itemsize / 1e9:.2f} billion parameters. "
        f"Try {', or '.join([*advice, 'a smaller model or a larger machine'])}"
    )
