"""Floor 0: what a computation takes and where it ran: time, forward tokens, peak memory, versions. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSION = "0.1.0"  # of Prunus, installed or not: pyproject.toml reads it here
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # the first two multiply bfloat16
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "optuna")
TRAINING = ("accelerate", "peft")  # further ones, by which trainings may differ
JUDGING = ("lm_eval", "datasets")  # and scores of tasks
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for the parameters of mallopt
KEPT_BYTES = 2**30  # what is kept at the end of the heap, and the largest block that comes from it


@dataclass
class Meter:
    """Time, tokens and peak memory of one computation; measurements may be nested."""

    start: float = field(default_factory=time.monotonic)
    forward_tokens: int = 0
    peak_bytes: int = 0
    peak_cuda_bytes: int = 0
    resident_bytes: int = field(default_factory=lambda: resident_bytes())  # when it began
    resident_cuda_bytes: int = field(default_factory=lambda: resident_cuda_bytes())

    def see(self) -> None:
        """Take the peaks since the last reset into account."""
        self.peak_bytes = max(self.peak_bytes, peak_bytes())
        if cuda := _cuda():
            self.peak_cuda_bytes = max(self.peak_cuda_bytes, int(cuda.max_memory_allocated()))

    def end(self, around: Iterable[Meter]) -> float:
        """Its seconds; the measurements around it leave out what it counted, so that nothing is counted twice."""
        seconds = time.monotonic() - self.start
        for meter in around:
            meter.start += seconds
            meter.forward_tokens -= self.forward_tokens
        return seconds

    def grown(self) -> tuple[int, int]:
        """Peaks above what was resident when the measurement began, bytes: of the process, and on the CUDA device."""
        cuda = self.peak_cuda_bytes - self.resident_cuda_bytes
        return max(0, self.peak_bytes - self.resident_bytes), max(0, cuda)


@cache
def words() -> str:
    """The machine in a few words: processor, its widest instructions for matrices, cores, memory."""
    name, widest = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
        widest = next((f", {word}" for word in INSTRUCTIONS if word in flags), "")
    memory = ""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return f"{name}{widest}, {os.cpu_count()} cores{memory}"


def environment() -> dict[str, str]:
    """Versions of what computes, and of the machine's system; imports nothing."""
    system = {"prunus": VERSION, "python": platform.python_version(), "platform": platform.platform()}
    return {**system, **versions(*PACKAGES)}


def versions(*names: str) -> dict[str, str]:
    """Versions of those of these packages that are installed; imports nothing."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def keep_freed_memory() -> bool:
    """Keep what is freed for the next allocation instead of giving it back to the system (glibc); whether that worked.

    Otherwise every large intermediate result is new to the process, and the system clears its pages one by one: a
    quarter of the time of an evaluation on two cores (docs/lab.md). For a whole process, before torch is imported;
    settings of the user's own (MALLOC_..., GLIBC_TUNABLES) stay. `reset_peak` gives back what is free.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES) and libc.mallopt(MMAP_THRESHOLD, KEPT_BYTES))
    except (OSError, AttributeError):  # another C library
        return False


def reset_peak() -> None:
    """Start a new measurement of peak memory, where the system can (Linux, CUDA)."""
    with contextlib.suppress(OSError, AttributeError):  # what is free is not the next computation's
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Peak resident memory of this process since the last reset; since its start where there is no reset."""
    if found := _status("VmHWM"):
        return found
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not say (anywhere but on Linux)."""
    return _status("VmRSS")


def resident_cuda_bytes() -> int:
    """What PyTorch has allocated on the CUDA device now; 0 where none is in use."""
    cuda = _cuda()
    return int(cuda.memory_allocated()) if cuda else 0


def _status(name: str) -> int:
    """Bytes of one line of Linux's record of this process; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _cuda() -> Any:
    """torch.cuda, if it is in use; never the reason that torch is imported."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None
