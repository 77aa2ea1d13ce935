"""Floor 3: ShortGPT (Men et al. 2024, arXiv:2403.03853): the layers of least block influence leave.

BI = 1 - mean cos(x before, x after), over all calibration tokens (eq. 1); `importance.score` has that formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.baselines.subject import FIRST_STAYS, Outcome, Subject, droppable, leavers, without
from prunus.models.slicing import extract
from prunus.scoring import importance


def compress(subject: Subject, keep: float) -> Outcome:
    """All influences are taken from the dense model, once."""
    return drop_least(subject, keep, influence(subject))


def influence(subject: Subject) -> Tensor:
    """Block influence of every layer, (layers,)."""

    def compute() -> Tensor:
        n = len(subject.stream)
        with subject.progress("influence of the layers", n * subject.ids.numel()) as advance:
            found = importance.score(
                subject.model, subject.family, subject.ids, "magnitude", micro=subject.micro, advance=advance
            )
        subject.count(subject.ids.numel())
        return found.blocks

    return subject.once("influence", compute)


def drop_least(subject: Subject, keep: float, worth: Tensor) -> Outcome:
    """The network without the layers of least worth (layers,)."""
    allowed = torch.tensor(droppable(subject))
    order = allowed[worth.cpu()[allowed].argsort(stable=True)].tolist()
    sub = without(subject, order[: leavers(subject, keep)])
    notes = (FIRST_STAYS,) if int(worth.argmin()) == 0 else ()
    return Outcome(extract(subject.model, subject.family, sub), sub, notes)
