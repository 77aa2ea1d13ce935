"""Floor 2: which candidates a process is computing, so that no other one computes them too.

On one machine: locks on single bytes of a file, which the kernel frees at the process's death. In a database: a running
trial that names the candidates, with a heartbeat; where it stops, other processes take them over after a while.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import optuna
from optuna.trial import TrialState, create_trial

from prunus.searching import storage

try:
    import fcntl
except ImportError:  # not on Windows: two processes may then compute the same candidate, and both results agree
    fcntl = None  # type: ignore[assignment]

Key = tuple[str, int, int]  # sub-network, draw, rung


class Claims(Protocol):
    """What keeps processes from doing the same work."""

    def take(self, keys: Sequence[Key], limit: int) -> AbstractContextManager[list[Key]]:
        """Claim up to `limit` keys that nobody else holds, until the end of a with statement."""
        ...


class LockClaims:
    """Locks on single bytes of a file; without a path nothing is locked, and everything may be had."""

    def __init__(self, path: Path | None) -> None:
        self._path = None if fcntl is None else path
        self._file: int | None = None

    @contextmanager
    def take(self, keys: Sequence[Key], limit: int) -> Iterator[list[Key]]:
        """Claim up to `limit` keys that nobody else holds, until the end of a with statement."""
        mine: list[Key] = []
        try:
            for key in keys:
                if len(mine) < limit and self._lock(key):
                    mine.append(key)
            yield mine
        finally:
            for key in mine:
                self._free(key)

    def _lock(self, key: Key) -> bool:
        if self._path is None:
            return True
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(key))
        except OSError:
            return False
        return True

    def _free(self, key: Key) -> None:
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _offset(key))


def _offset(key: Key) -> int:
    name, draw, rung = key
    return (int(name[:12], 16) * 31 + draw * 7919 + rung) % (1 << 52)


class TrialClaims:
    """Running trials of the study itself, in the order of their numbers: of two that want a key, the first has it.

    A claim lives as long as its heartbeat, which Optuna compares by the database's own clock. After GRACE seconds
    without one it is failed by whoever looks. A process that was only asleep for so long may then have computed what
    another one did too; the record keeps the first of both scores, for all.
    """

    def __init__(self, backend: optuna.storages.RDBStorage, study: optuna.Study) -> None:
        self._backend, self._study = backend, study
        self._id = backend.get_study_id_from_name(study.study_name)
        self._seen: dict[int, float] = {}  # claims that have shown no sign of life yet, and since when we know them

    @contextmanager
    def take(self, keys: Sequence[Key], limit: int) -> Iterator[list[Key]]:
        """Claim up to `limit` keys that nobody else holds, until the end of a with statement."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        held = self._held()
        wanted = [key for key in keys if _text(key) not in held][:limit]
        if not wanted:
            yield []
            return
        claim = create_trial(state=TrialState.RUNNING, user_attrs={"claims": [_text(key) for key in wanted]})
        trial = self._backend.create_new_trial(self._id, claim)
        over = threading.Event()
        beat = threading.Thread(target=self._beat, args=(trial, over), daemon=True)
        try:
            self._backend.record_heartbeat(trial)
            self._backend.set_trial_user_attr(trial, "beats", True)
            beat.start()
            earlier = self._held(self._backend.get_trial_number_from_id(trial))
            yield [key for key in wanted if _text(key) not in earlier]
        finally:
            over.set()
            if beat.ident is not None:
                beat.join()
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # somebody took us for dead
                self._backend.set_trial_state_values(trial, TrialState.FAIL)

    def _held(self, before: int | None = None) -> set[str]:
        """The keys that living claims name; of those with a lower number than `before` only, where it is given."""
        found: set[str] = set()
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            named = trial.user_attrs.get("claims")
            if named and (before is None or trial.number < before) and self._lives(trial):
                found |= set(named)
        return found

    def _lives(self, trial: optuna.trial.FrozenTrial) -> bool:
        """False for a claim whose process died before its first heartbeat, which Optuna waits for forever."""
        if trial.user_attrs.get("beats"):
            return True
        return time.monotonic() - self._seen.setdefault(trial.number, time.monotonic()) < storage.GRACE

    def _beat(self, trial: int, over: threading.Event) -> None:
        while not over.wait(storage.BEAT):
            with suppress(optuna.exceptions.StorageInternalError):  # a busy database: the next beat may come through
                self._backend.record_heartbeat(trial)


def _text(key: Key) -> str:
    name, draw, rung = key
    return f"{name} {draw} {rung}"


__all__ = ["Claims", "Key", "LockClaims", "TrialClaims"]
