"""Floor 2: whether a model and the work on it fit, estimated before anything is read."""

from __future__ import annotations

import copy
import ctypes
import sys
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


@dataclass(frozen=True)
class Work:
    """What a run does with a model, as far as its memory goes; by default nothing: the model is loaded."""

    samples: int = 0  # calibration windows, those held out included
    length: int = 0  # tokens in each
    curvature: bool = False  # second moments of the gradients are taken
    sequential: int = 0  # windows of the sequential pass; 0: there is none
    keep: float = 0.0  # the largest share of the blocks that a network keeps

    @classmethod
    def of(cls, config: CompressConfig) -> Work:
        """The work of `compress` with these settings."""
        c, r = config.calibration, config.reform
        keep = max((target.value if target.kind == "keep" else 1.0 for target in config.targets), default=1.0)
        refits = config.method == "prunus" and r.sequential and r.method != "none"
        windows = min(c.samples, r.sequential_samples or c.samples) if refits else 0
        return cls(c.samples + c.holdout, c.length, config.method == "prunus" and r.fisher > 0, windows, keep)


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
    matrices and their factors, the curvature of all layers, logits, and the weights of one network that is refitted
    or extracted. What comes true is in benchmarks/results/memory.json.
    """
    if not work.samples:
        return {}
    d, size, model = dims(config), dtype.itemsize, _described(config)
    n, hidden, vocab = int(config.num_hidden_layers), d["hidden"], d["vocab"]
    inner = d["kv_heads"] * d["q_per_kv"] * d["head_dim"]
    blocks = sum(p.numel() for p in model.get_submodule(family_of(config).layers).parameters())
    outside = sum(p.numel() for p in model.parameters()) - blocks
    refitted = round(size * blocks * work.keep)
    curvature = 2 * 4 * n * hidden**2 if work.curvature else 0
    grams, square = 4 * (d["mlp"] ** 2 + inner**2), 4 * max(d["mlp"], inner) ** 2
    window = min(work.length, 512)
    saved = window * (n * size * (12 * hidden + 2 * inner + 5 * d["mlp"]) + vocab * (size + 16))  # for the gradients
    carried = work.samples * work.length * hidden * size
    need = {"score": curvature + max(carried + grams + 3 * square, saved if work.curvature else 0)}
    if work.curvature:
        judged = 2 * 256 * vocab * 2 * size + 5 * 4 * 2**24  # logits of the positions that a divergence is taken at
        need["reform"] = curvature + 2 * grams + 3 * square + judged
        need["search"] = 2 * grams + 3 * square + judged + min(512 << 20, 2 * size * blocks)
    if work.sequential:
        states = work.sequential * work.length * (8 * hidden + size * (6 * hidden + d["mlp"]))
        need["extract"] = 3 * refitted // 2 + states + 4 * 128 * vocab * size + grams + 3 * square
    need["evaluate"] = 2 * refitted + size * (outside + 2 * 512 * vocab)
    return need


def memory_need(config: Any, dtype: torch.dtype, work: Work = NOTHING) -> int:
    """Bytes for the weights and the most that any step of the work needs beside them."""
    return parameter_count(config) * dtype.itemsize + max(memory_needs(config, dtype, work).values(), default=0)


def available(device: str = "cpu") -> int | None:
    """Bytes that can still be had on a device, a container's limit included; None where the system does not say."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0]) if torch.cuda.is_available() else None
    if device != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(cache["inactive_file"])
        return min(free, limit - used)
    except (OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        return free


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
    if weights < free and step in ("score", "extract"):
        advice.append("fewer or shorter calibration windows")
        advice.append("--set reform." + ("sequential=false" if step == "extract" else "fisher=0"))
    where = f" and {needs[step] / 1e9:.1f} GB for the step {step}" if step else ""
    raise UserError(
        f"not enough memory on {device}: this model needs about {need / 1e9:.1f} GB in {str(dtype).rpartition('.')[2]} "
        f"({weights / 1e9:.1f} GB of weights{where}) and {free / 1e9:.1f} GB are free; the largest that fits has about "
        f"{free / need * weights / dtype.itemsize / 1e9:.2f} billion parameters. "
        f"Try {', or '.join([*advice, 'a smaller model or a larger machine'])}"
    )
