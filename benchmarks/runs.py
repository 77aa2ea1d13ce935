"""Copies of a run directory, on which a benchmark may try something; the run itself is left alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

WRITTEN = ("manifest.json", "config.yaml", "trials.journal", "trials.journal.claims")  # files that a run writes into


def copied(run: Path, out: Path, left_out: Iterable[str] = ()) -> Path:
    """A copy without its lock, its report and `left_out`: hard links, but for the files that a run writes into."""
    gone = {".prunus", "report", *left_out}

    def copy(source: str, target: str) -> None:
        (shutil.copy2 if Path(source).name in WRITTEN else os.link)(source, target)

    shutil.copytree(run, out, copy_function=copy, ignore=lambda _, names: gone & set(names))
    return out
