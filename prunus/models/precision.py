"""Floor 1: the type that weights are stored in, and the type that a device computes in.

Most processors do not multiply 16-bit numbers: PyTorch then does it element by element, 7 times slower than float32
going forward and 75 times slower going back (two cores of an AMD EPYC 7003, torch 2.13; docs/lab.md). There, weights
of 16 bits are widened to float32 once they are read, which changes none of them, and rounded when they are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def multiplies(dtype: torch.dtype, device: torch.device | str) -> bool:
    """True if products of matrices of this type are no slower on the device than those of float32."""
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)  # oneDNN's own word
    return bool(supported is not None and supported())


def computing(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The type to compute in, for weights that are stored in `dtype`."""
    return dtype if multiplies(dtype, device) else torch.float32


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all floating-point parameters another type (**in place**). Buffers stay: frequencies of RoPE are float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def stored(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the model's parameters have the type that they are written in; they are rounded for good."""
    before = next(model.parameters()).dtype
    cast(model, dtype)
    try:
        yield
    finally:
        cast(model, before)


__all__ = ["cast", "computing", "multiplies", "stored"]
