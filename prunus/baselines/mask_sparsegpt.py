"""Floor 3: SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774) as a mask, unstructured or N:M, algorithm 1.

With H = X X^T + damping and the upper Cholesky factor U of H^-1, columns are taken from the left: in each block of 128
the weights of least w_ij^2 / U_jj^2 become zero, and what a zero loses is spread over the columns to its right,
W_:,k -= (w_ij / U_jj) U_jk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunus.baselines.activity import walk
from prunus.baselines.mask_magnitude import NofM, kept_of_matrices, masked, n_m_mask
from prunus.baselines.mask_wanda import linear_paths
from prunus.baselines.subject import Outcome, Subject
from prunus.errors import UserError
from prunus.scoring.moments import writer_weight

BLOCK, DAMPING = 128, 0.01


def compress(subject: Subject, keep: float, *, n_of_m: NofM | None = None) -> Outcome:
    """Every matrix of the blocks keeps the same share; the weights that stay take over."""
    share = kept_of_matrices(subject, keep)

    def prune(i: int, layer: nn.Module, grams: Mapping[str, Tensor]) -> None:
        factors: dict[int, Tensor] = {}
        for path, gram in grams.items():
            if id(gram) not in factors:
                factors[id(gram)] = factor(gram)
            weight = writer_weight(layer, path)
            weight.copy_(sparse(weight.float(), factors[id(gram)], share, n_of_m).to(weight.dtype))

    return masked(subject, walk(subject, linear_paths(subject), prune, gram=True))


def factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Gram's inverse, (in, in) float32; inputs that are never on get 1."""
    g = gram.double() if gram.shape[0] <= 2048 else gram.clone()
    dead = g.diagonal() == 0
    g.diagonal()[dead] = 1
    g.diagonal().add_(DAMPING * g.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(g)
    if bool(failed):
        raise UserError(f"a Gram matrix of {len(g)} inputs is singular; use more calibration tokens, or float32")
    inverse: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return inverse.float()


def sparse(weight: Tensor, upper: Tensor, share: float, n_of_m: NofM | None = None, block: int = BLOCK) -> Tensor:
    """The pruned and updated weights, (out, in) float32; weight and upper (in, in) are not changed."""
    w, n = weight.T.contiguous(), weight.shape[1]  # (in, out): a column's update touches whole lines of memory
    diagonal = upper.diagonal()[:, None]
    for start in range(0, n, block):
        end = min(start + block, n)
        kept = None if n_of_m else _lowest(w[start:end] ** 2 / diagonal[start:end] ** 2, share)
        errors = torch.zeros_like(w[start:end])
        for j in range(start, end):
            if n_of_m and (j - start) % n_of_m[1] == 0:
                part = slice(j, j + n_of_m[1])
                piece = n_m_mask((w[part] ** 2 / diagonal[part] ** 2).T, n_of_m).T
                kept = piece if kept is None or j == start else torch.cat([kept, piece])
            assert kept is not None
            lost = torch.where(kept[j - start], 0.0, w[j])
            errors[j - start] = error = lost / diagonal[j]
            w[j] -= lost
            w[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return w.T.contiguous()


def _lowest(scores: Tensor, share: float) -> Tensor:
    """A mask of the highest scores of a whole block of columns, as many as `share` of them."""
    count = int(share * scores.numel() + 1e-6)
    order = scores.flatten().argsort(descending=True, stable=True)[:count]
    flat = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    flat[order] = True
    return flat.view(scores.shape)
