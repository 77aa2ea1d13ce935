"""Floor 2: the signals of a teacher that is not trained: its last hidden states, computed once for each window.

Hidden states are kept rather than logits: 576 numbers a token instead of 49,152 for SmolLM2-135M, and exact.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.models.heads import Head, head_of
from prunus.texts.calibration import token_hash

LIMIT = 8 * 10**9  # bytes of a cache at most; more windows are computed anew each time
log = logging.getLogger(__name__)


class Teacher:
    """A model in evaluation mode and, in a file, what it said of windows that were seen before.

    folder: where the cache lies (None: no cache). ids: all windows (n, length), in the order of their numbers; with
    `name`, what identifies the model, they name the file, so that a cache of others is never read.
    """

    def __init__(self, model: Any, folder: Path | None = None, ids: Tensor | None = None, name: str = "") -> None:
        self.model = model.eval().requires_grad_(False)
        self.head: Head = head_of(self.model).whole()
        width, dtype = int(self.model.config.hidden_size), next(self.model.parameters()).dtype
        self.device = next(self.model.parameters()).device
        self.states: Tensor | None = None
        size = width * (ids.numel() if ids is not None else 0)
        if folder is not None and ids is not None and size * dtype.itemsize <= LIMIT:
            folder.mkdir(parents=True, exist_ok=True)
            own = f"teacher-{token_hash(ids)[:12]}-{name[:12]}-{str(dtype).rpartition('.')[2]}"
            if not _fits(folder / f"{own}.states", size * dtype.itemsize):
                log.warning("%s has no room for what the teacher says; it runs anew for every window", folder)
                return
            self.states = _mapped(folder / f"{own}.states", size, dtype).view(*ids.shape, width)
            self.known = _mapped(folder / f"{own}.known", len(ids), torch.uint8)

    def hidden(self, index: Tensor, ids: Tensor) -> Tensor:
        """Last hidden states (batch, length, d) of the windows with these numbers, whose tokens are ids."""
        if self.states is None:
            return self.compute(ids)
        rows = index.cpu()
        new = (self.known[rows] == 0).nonzero().flatten()
        if len(new):
            self.states[rows[new]] = self.compute(ids[new.to(ids.device)]).cpu()
            self.known[rows[new]] = 1
        return self.states[rows].to(ids.device)

    @torch.no_grad()
    def compute(self, ids: Tensor) -> Tensor:
        """The same of any windows, not kept."""
        with torch.autocast(ids.device.type, enabled=False):
            found: Tensor = self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return found


def _fits(path: Path, size: int) -> bool:
    """Whether the disk has room for a file of so many bytes, what it has of it already counted; mapped memory that
    finds the disk full ends the process without a word."""
    there = 512 * path.stat().st_blocks if path.exists() else 0
    return shutil.disk_usage(path.parent).free + there > 1.02 * size + 10**8


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """A tensor that lives in a file, zeros at first."""
    if not path.exists() or path.stat().st_size != size * dtype.itemsize:
        with path.open("ab") as file:  # several processes may open it at once: nothing that is there is lost
            file.truncate(size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


__all__ = ["Teacher"]
