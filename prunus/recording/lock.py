"""Floor 0: one process at a time in a directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from prunus.errors import UserError
from prunus.recording.artefact import writing


def acquire(directory: Path) -> FileLock:
    """The lock of a run. The system gives it free when its process dies, however it dies."""
    owner = directory / ".prunus" / "owner"
    lock = FileLock(directory / ".prunus" / "lock", timeout=0)
    with writing(directory):
        owner.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
            raise UserError(f"{who} is working on {str(directory)!r}; wait for it, or choose another --out") from None
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return lock
