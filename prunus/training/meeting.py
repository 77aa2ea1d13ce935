"""Floor 1: several processes, one run: the first one works, the others wait until it calls them to the training.

Processes of one launcher find each other by the key-value store that torch.distributed rendezvous at; it carries one
word here, so nobody's device is busy while waiting, and no time limit of a collective runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from prunus import launched
from prunus.errors import UserError

WORD = "prunus/word"
COME, GO = b"come", b"go"  # to the training; home, there is none
PAUSE = 0.5  # seconds between two looks


@cache
def _store() -> Any:
    try:
        return next(rendezvous("env://"))[0]
    except ValueError as error:
        raise UserError(
            f"{launched.processes()} processes are announced (WORLD_SIZE), but how they meet is not: {error}. Start "
            "them with torchrun or accelerate launch, or unset WORLD_SIZE"
        ) from None


@contextmanager
def leading() -> Iterator[None]:
    """What the first process does; whatever ends it, the others are told, and it is alone afterwards."""
    if launched.processes() > 1:
        _store()
    try:
        yield
    finally:
        part()


def call() -> None:
    """Tell the other processes that all is ready for the training."""
    if launched.processes() > 1:
        _store().set(WORD, COME)


def part() -> None:
    """After the training, or where there is none: the other processes may go home, and this one is alone."""
    if launched.processes() == 1:
        return
    if launched.is_main() and not _store().check([WORD]):
        _store().set(WORD, GO)
    if dist.is_initialized():
        from accelerate.state import AcceleratorState

        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    launched.forget()


def called() -> bool:
    """Wait for the first process's word: True if this process is to train with it."""
    store = _store()
    try:
        while not store.check([WORD]):
            time.sleep(PAUSE)
        return bool(store.get(WORD) == COME)
    except (RuntimeError, ConnectionError):  # the store lived in the first process, which is gone
        raise UserError("the first process has ended before the training began; see what it said") from None


__all__ = ["call", "called", "leading", "part"]
