"""Floor 0: how long work says how far it is. Verbs take a `Progress`; the command line shows it, a library need not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO

Advance = Callable[[int], None]  # called with the number of items done since the last call


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
                line = f"{indent}{description}:{count} in {time.monotonic() - start:.1f} s"
                print(line, file=self.stream or sys.stderr, flush=True)
        finally:
            self._open -= 1


class BarProgress:
    """Bars with the time left, on a terminal; nested work is shown below its parent and leaves when it is done."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("{task.fields[mark]} {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=console,
        )
        self._open = 0

    @contextmanager
    def __call__(self, description: str, total: int | None = None) -> Iterator[Advance]:
        if not self._open:
            self.bars.start()
        self._open += 1
        task = self.bars.add_task("  " * (self._open - 1) + description, total=total, mark=" ")
        try:
            yield lambda n: self.bars.advance(task, n)
            done = self.bars.tasks[self.bars.task_ids.index(task)].completed
            self.bars.update(task, total=done or 1, completed=done or 1, mark="[green]✓[/]")
            if self._open > 1:
                self.bars.remove_task(task)
        finally:
            self._open -= 1
            if not self._open:
                self.bars.stop()
                for old in self.bars.task_ids:
                    self.bars.remove_task(old)
