"""Floor 2: whether a model and the work on it fit, estimated before anything is read."""

from __future__ import annotations

import copy
import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from prunus.errors import UserError
from prunus.models.families import dims
from prunus.models.precision import multiplies


def parameter_count(config: Any) -> int:
    """Parameters of the model that a configuration describes, tied ones once; nothing is allocated."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())  # parameters() names a shared one once


def memory_need(config: Any, dtype: torch.dtype, *, samples: int = 0, length: int = 0) -> int:
    """Bytes for the weights, and with calibration windows (samples, length) for the work on one layer at a time.

    The work: hidden states of all windows; one layer's Gram matrices in float32 and three float64 matrices of the
    larger one; logits of one window in float32, twice.
    """
    weights = parameter_count(config) * dtype.itemsize
    if not samples:
        return weights
    d = dims(config)
    inner = d["kv_heads"] * d["q_per_kv"] * d["head_dim"]
    carried = samples * length * d["hidden"] * dtype.itemsize
    layer = 4 * (d["mlp"] ** 2 + inner**2) + 3 * 8 * max(d["mlp"], inner) ** 2
    return weights + carried + layer + 2 * 4 * length * d["vocab"]


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


def refuse_too_large(
    config: Any, dtype: torch.dtype, device: str = "cpu", *, samples: int = 0, length: int = 0
) -> None:
    """Raise UserError where the estimate exceeds what is free, saying both and the largest model that fits."""
    free = available(device)
    if free is None:
        return
    need, weights = memory_need(config, dtype, samples=samples, length=length), memory_need(config, dtype)
    if need <= free:
        return
    advice = []
    if dtype == torch.float32 and multiplies(torch.bfloat16, device) and need - weights / 2 <= free:
        advice.append("--dtype bfloat16")
    if samples and weights < free:
        advice.append("fewer or shorter calibration windows")
    fits = max(0, free - (need - weights)) / dtype.itemsize
    raise UserError(
        f"not enough memory on {device}: this model needs about {need / 1e9:.1f} GB in {str(dtype).rpartition('.')[2]} "
        f"({weights / 1e9:.1f} GB of weights) and {free / 1e9:.1f} GB are free; the largest that fits has about "
        f"{fits / 1e9:.2f} billion parameters. Try {', or '.join([*advice, 'a smaller model or a larger machine'])}"
    )
