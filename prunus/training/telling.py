"""Floor 3: what a training says while it runs: its progress, its log, and where Trainer reports to."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from prunus.errors import UserError

SAVE_SECONDS = 600  # that a killed training of one process loses at most, whatever its steps take


def check_installed(report_to: str = "none") -> None:
    """Raise UserError where a package is missing that Trainer or a reporter needs, or no reporter has that name."""
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("training needs the package accelerate; install it with pip install 'prunus[train]'")
    names = reporters(report_to)
    try:
        for reporter in get_reporting_integration_callbacks(names if names != ["none"] else []):  # type: ignore[no-untyped-call]
            reporter()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"train.report_to={report_to}: {error}; install what it needs, or leave it out") from error


def reporters(report_to: str) -> list[str]:
    """The names in `train.report_to`, which stand with commas or blanks between them."""
    return report_to.replace(",", " ").split()


class Telling(TrainerCallback):
    """Progress of steps, the log as a file (one line of JSON for each), and states after so many seconds.

    buffers: the model's, by name, as they must be while it trains: DeepSpeed rounds the frequencies of RoPE.
    """

    def __init__(self, advance: Callable[[int], None], log: Path, model: Any, buffers: Mapping[str, Tensor]) -> None:
        self.advance, self.log, self.model, self.buffers = advance, log, model, buffers
        self._saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()
        self._saved = time.monotonic()
        if state.global_step:  # a training that goes on
            self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)
        if args.world_size == 1 and time.monotonic() - self._saved >= SAVE_SECONDS:  # several clocks would differ
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()

    def restore(self) -> None:
        """Put the buffers back, to the bit."""
        for name, buffer in self.buffers.items():
            self.model.get_buffer(name).data = buffer


__all__ = ["Telling", "check_installed", "reporters"]
