"""Floor 0: how long work says how far it is. Verbs take a `Progress`; the command line shows it, a library need not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO

Advance = Callable[[int], None]  # called with the number of items done since the last call
Tally = Callable[[int, int], None]  # called with the numbers of items done and in all


class Progress(Protocol):
    """`with progress("score", 30) as advance: ... advance(1)`; a total of None means that it is not known."""

    def __call__(self, description: str, total: int | None = None) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(description: str, total: int | None = None) -> Iterator[Advance]:
    """Progress that nobody sees."""
    yield lambda n: None


class LineProgress:
    """One line on a stream for each finished piece of work: for logs, pipes and continuous integration."""

    def __init__(self, stream: TextIO | None = None, depth: int = 2) -> None:
        self.stream = stream
        self.depth = depth  # pieces nested deeper than this are not shown
        self._open = 0

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Advance]:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n

        start = time.monotonic()
        self._open += 1
        try:
            yield advance
            if self._open <= self.depth:
                count = "" if not done else f" {done}/{total}" if total and total != done else f" {done}"
                indent = "  " * (self._open - 1)
                line = f"{indent}{description}:{count} in {duration(time.monotonic() - start)}"
                print(line, file=self.stream or sys.stderr, flush=True)
        finally:
            self._open -= 1


class BarProgress:
    """Bars with the time left, on a terminal; a finished piece of work leaves one line, what is nested in it none."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._open = 0

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Advance]:
        from rich.text import Text

        start = time.monotonic()
        if not self._open:
            self.bars.start()
        self._open += 1
        task = self.bars.add_task("  " * (self._open - 1) + description, total=total)
        finished = False
        try:
            yield lambda n: self.bars.advance(task, n)
            finished = True
        finally:
            self._open -= 1
            self.bars.remove_task(task)
            if not self._open:
                self.bars.stop()
                if finished:
                    took = duration(time.monotonic() - start)
                    self.bars.console.print(Text.assemble(("✓ ", "green"), description, (f"  {took}", "dim")))


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
