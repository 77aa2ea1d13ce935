"""Floor 3: Wanda (Sun et al. 2023, arXiv:2306.11695) as a mask: the least |W_ij| ||X_j|| of each row go.

Layer by layer, each judged on what the pruned layers before it produce.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prunus.baselines.activity import walk
from prunus.baselines.mask_magnitude import NofM, kept_of_matrices, masked, n_m_mask, top_of
from prunus.baselines.subject import Outcome, Subject
from prunus.scoring.moments import writer_weight
from prunus.scoring.scores import wanda


def compress(subject: Subject, keep: float, *, n_of_m: NofM | None = None) -> Outcome:
    """Every row of every matrix of the blocks keeps the same share."""
    share = kept_of_matrices(subject, keep)

    def zero(i: int, layer: nn.Module, square: Mapping[str, Tensor]) -> None:
        for path, moment in square.items():
            weight = writer_weight(layer, path)
            scores = wanda(weight, moment)
            weight.mul_(n_m_mask(scores, n_of_m) if n_of_m else top_of(scores, share))

    return masked(subject, walk(subject, linear_paths(subject), zero))


def linear_paths(subject: Subject) -> list[str]:
    """Paths of the matrices in a layer."""
    return [path for path, row in subject.family.inner.items() if "->" in row]
