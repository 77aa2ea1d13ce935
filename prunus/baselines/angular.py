"""Floor 3: the run of layers leaves that turns the residual stream least (Gromov et al. 2024, arXiv:2403.17887).

d(l, n) = arccos(cos(x_l, x_(l+n))) / pi at the last token of every window, averaged over the windows (eq. 7); the run
that starts at the least d leaves. Without the fine-tuning that the paper adds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunus.baselines.activity import activity
from prunus.baselines.subject import Outcome, Subject, droppable, leavers, without
from prunus.models.slicing import extract


def compress(subject: Subject, keep: float) -> Outcome:
    """One run of neighbouring layers leaves."""
    n = leavers(subject, keep)
    turns = distances(activity(subject).last, n) if n else torch.zeros(1)
    starts = [i for i in droppable(subject) if i + n <= len(subject.stream)]
    first = min(starts, key=lambda i: float(turns[i])) if n else 0
    sub = without(subject, range(first, first + n))
    return Outcome(extract(subject.model, subject.family, sub), sub)


def distances(states: Tensor, n: int) -> Tensor:
    """Mean angle over pi between the states n layers apart: (layers + 1, windows, hidden) -> (layers + 1 - n,)."""
    cosine = torch.nn.functional.cosine_similarity(states[: len(states) - n].double(), states[n:].double(), dim=-1)
    return (cosine.clamp(-1, 1).arccos() / math.pi).mean(-1)
