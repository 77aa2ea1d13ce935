"""Floor 3: magnitude pruning (Han et al. 2015, arXiv:1506.02626) as a mask: the smallest weights become zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from prunus.baselines.subject import Outcome, Subject
from prunus.errors import UserError
from prunus.models.families import Family
from prunus.models.rows import Row, rows

NofM = tuple[int, int]  # so many of each m neighbouring inputs are kept


def compress(subject: Subject, keep: float, *, n_of_m: NofM | None = None) -> Outcome:
    """Each matrix of the blocks keeps its largest weights."""
    model = subject.copy()
    share = kept_of_matrices(subject, keep)
    with torch.no_grad():
        for _, weight in matrices(model, subject.family):
            kept = n_m_mask(weight.abs(), n_of_m) if n_of_m else top_of(weight.abs().flatten()[None], share)
            weight.mul_(kept.view_as(weight))
    return masked(subject, model)


def matrices(model: nn.Module, family: Family) -> Iterator[tuple[Row, Tensor]]:
    """Every matrix of the blocks as (out, in): a view of the parameter, to be changed in place."""
    for row in rows(model, family):
        if row.layer is not None and row.parameter.ndim == 2:
            weight = row.parameter.data
            yield row, weight if isinstance(row.module, nn.Linear) else weight.T


def kept_of_matrices(subject: Subject, keep: float) -> float:
    """The share of the matrices' weights that stays where `keep` of all parameters in the blocks does."""
    inside = sum(weight.numel() for _, weight in matrices(subject.model, subject.family))
    share = (subject.budget(keep) - (subject.blocks - inside)) / inside
    if share <= 0:
        raise UserError(f"cannot keep {keep:g}: the norms and biases of the blocks alone are more; keep more")
    return min(1.0, share)


def top_of(scores: Tensor, share: float) -> Tensor:
    """A mask of the int(share n) highest scores of every row: (rows, n) -> bool (rows, n); equal ones: the first."""
    count = int(share * scores.shape[1] + 1e-6)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def n_m_mask(scores: Tensor, n_of_m: NofM) -> Tensor:
    """A mask of the n highest scores of every m neighbouring inputs: (out, in) -> bool (out, in).

    Raises UserError where the inputs are no multiple of m.
    """
    n, m = n_of_m
    if scores.shape[1] % m:
        raise UserError(f"{n}:{m} needs a number of inputs that is a multiple of {m}; a matrix has {scores.shape[1]}")
    parts = scores.reshape(-1, m)
    order = parts.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(parts, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


def masked(subject: Subject, model: nn.Module) -> Outcome:
    """What all masks give: the dense shape, with zeros in it."""
    return Outcome(model, subject.whole, ("zeros in a dense network: neither smaller nor faster as it stands",))
