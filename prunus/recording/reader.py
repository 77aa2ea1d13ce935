"""Floor 4: a run directory that another process works on, to read from: nothing is locked, recorded or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prunus.config import STEPS
from prunus.errors import UserError
from prunus.recording.artefact import FORMATS
from prunus.recording.run import Run, read_manifest

T = TypeVar("T")


class ReadOnlyRun(Run):
    """The same as a `Run` to whoever needs what is done already; the rest is refused."""

    def __init__(self, directory: str | Path, *, steps: Sequence[str] = STEPS) -> None:
        super().__init__(Path(directory), read_manifest(directory), None, steps)

    def do(
        self,
        step: str,
        file: str,
        compute: Callable[[], T],
        save: Callable[[T, Path], None] | None = None,
        load: Callable[[Path], T] | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
    ) -> T:
        """The artefact `file`, loaded. Raises UserError where it is not done."""
        if not self.done(file, inputs):
            raise UserError(
                f"{str(self.path(file))!r} is not there, or not whole; processes of one training need the same "
                "directory on a disk that all of them see"
            )
        if load is None:
            _, load = FORMATS[Path(file).suffix]
        return load(self.path(file))

    def grow(self, step: str, file: str) -> Path:
        """The path of a file that the other process appends to."""
        return self.path(file)

    def note(self, key: str, value: Any) -> None:
        """Nothing: the other process writes it down."""

    def close(self) -> None:
        """Nothing was locked."""


__all__ = ["ReadOnlyRun"]
