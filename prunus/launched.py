"""Floor 0: what a launcher of several processes (torchrun, accelerate launch) says in the environment; no torch."""

from __future__ import annotations

import os

SAID = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def processes() -> int:
    """How many processes were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True in the process that writes and speaks: the only one, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device(device: str) -> str:
    """Of the CUDA devices that several processes share ("cuda"), this process's own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def forget() -> None:
    """From here on this process is alone: libraries that are asked later start no group of processes."""
    for name in SAID:
        os.environ.pop(name, None)


__all__ = ["forget", "is_main", "own_device", "processes"]
