"""What makes tests quick: nothing here depends on how exact a speed is, and most tests look at no picture.

`python hurry.py compress ...` is the command line in the same haste, for tests that need processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure

from prunus import describe, evaluation
from prunus.recording import pictures

ALL_THREADS = torch.get_num_threads()
_paint = pictures.save


def hurry(threads: int = 1) -> None:
    """As few turns as may be where speed is measured, short samples, no ink, and one thread: tiny models lose time with
    two."""
    evaluation.TURNS, evaluation.PATIENCE = 1, 0.0
    describe.SAMPLE_TOKENS = 8
    pictures.save = _sketch
    torch.set_num_threads(threads)


def _sketch(figure: Figure, stem: Path) -> list[Path]:
    """The files of a picture with nothing in them: text takes matplotlib a second."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        path.write_text("not painted: see tests/hurry.py\n")
    return paths


@contextmanager
def painted() -> Iterator[None]:
    """Pictures as users get them."""
    pictures.save = _paint
    try:
        yield
    finally:
        pictures.save = _sketch


if __name__ == "__main__":
    hurry()
    from prunus.cli import app

    app(prog_name="prunus")
