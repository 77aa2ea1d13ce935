"""Floor 3: the weights that are kept take over the work of those that are not (reformation), in closed form.

Everything here takes tensors and returns tensors. A *writer* is the linear layer whose input is pruned (the attention's
output projection, the MLP's down projection): weight (out, n), and gram (n, n) = X^T X / tokens of its inputs, in
float32 or float64. `kept` are indices of the inputs that stay. Problem: Shen et al. 2024 (arXiv:2409.17372), eq. 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHRINK = 0.85  # share of a matrix's rows below which those that were removed are cut out of it


def ridge(gram: Tensor, damping: float) -> Tensor:
    """What is added to the diagonal of a Gram matrix, one number per input, to make few tokens or dead inputs solvable.

    damping times the mean of the diagonal with its largest tenth cut down to the rest, so that a few massive inputs
    (a transformer's attention sinks; Sun et al. 2024, arXiv:2402.17762) do not drown the ridge's measure for all the
    others; at least 3 % of damping times the input's own entry, which keeps massive, correlated inputs solvable.
    """
    own = gram.diagonal()
    typical = own.clamp(max=own.quantile(0.9)).mean() + 1e-5 * own.mean()
    return damping * torch.maximum(typical.expand_as(own), 0.03 * own) + torch.finfo(gram.dtype).tiny


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram + diag(ridge). A copy."""
    out = gram.clone()
    out.diagonal().add_(ridge(gram, damping))
    return out


def factor(gram: Tensor) -> Tensor:
    """Lower Cholesky factor; raises ValueError, naming the cure, where rounding left the matrix indefinite."""
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise ValueError(
            f"the Gram matrix of {gram.shape[0]} inputs is not positive definite (pivot {int(info)}); "
            "use more calibration tokens or a larger damping"
        )
    return lower


def closed_form(weight: Tensor, gram: Tensor, kept: Tensor, damping: float = 0.0) -> Tensor:
    """The exact minimiser of ||W_K' X_K - W X||^2 + ||(W_K' - W_K) R^1/2||^2, R = diag(ridge), shape (out, len(kept)).

    W_K' = W_K + W_P G_PK (G_KK + R)^-1, the limit of the paper's ADMM (Shen et al. 2024, eq. 7-9).
    """
    weight, kept = weight.to(gram.dtype), kept.to(gram.device)
    k = len(kept)
    if bool((kept == torch.arange(k, device=kept.device)).all()):  # views instead of copies
        own, lost = weight[:, :k], weight[:, k:] @ gram[k:, :k]
    else:
        gone = omitted(kept, len(gram))
        own, lost = weight[:, kept], weight[:, gone] @ gram[gone][:, kept]
    return own + torch.cholesky_solve(lost.T, _factor_of(gram, kept, damping)).T


def carried(gram: Tensor, kept: Tensor, damping: float = 0.0) -> Tensor:
    """G_PK (G_KK + R)^-1, shape (omitted, kept): `closed_form` is W_K + W_P times this, for any weight W."""
    kept = kept.to(gram.device)
    cross = gram[omitted(kept, len(gram))][:, kept]
    return torch.cholesky_solve(cross.T, _factor_of(gram, kept, damping)).T


def omitted(kept: Tensor, n: int) -> Tensor:
    """The indices of 0..n-1 that are not kept, ascending."""
    gone = torch.ones(n, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero().flatten()


def _factor_of(gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    k = len(kept)
    prefix = bool((kept == torch.arange(k, device=kept.device)).all())
    system = (gram[:k, :k] if prefix else gram[kept][:, kept]).clone()
    system.diagonal().add_(ridge(gram, damping)[kept])
    return factor(system)


def error_curve(weight: Tensor, gram: Tensor, damping: float = 0.0) -> Tensor:
    """Reformed error of every nested level: entry k is the error with inputs 0..k-1 kept, k = 0..n; shape (n + 1,).

    One Cholesky of the damped Gram in the sorted order, G = L L^T: error(k) = sum over j >= k of ||(W L)_j||^2.
    """
    column = (weight.to(gram.dtype) @ factor(damped(gram, damping))).square().sum(0)
    tail = column.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def reformed_error(weight: Tensor, gram: Tensor, kept: Tensor, damping: float = 0.0) -> Tensor:
    """Error tr[W_P (G_PP - G_PK G_KK^-1 G_KP) W_P^T] of the damped problem after reformation, a scalar."""
    weight = weight.to(gram.dtype)
    full = damped(gram, damping)
    kept = kept.to(gram.device)
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    lost = weight[:, gone]
    inner = lost @ full[gone][:, gone]
    error = (inner * lost).sum()
    if len(kept) and int(gone.sum()):
        cross = lost @ full[gone][:, kept]
        solved = torch.linalg.solve_triangular(factor(full[kept][:, kept]), cross.T, upper=False)
        error = error - solved.square().sum()
    return error.clamp(min=0)


def unreformed_error(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Error tr[W_P G_PP W_P^T] of leaving the omitted inputs out and doing nothing else, a scalar."""
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept.to(gram.device)] = False
    lost = weight.to(gram.dtype)[:, gone]
    return ((lost @ gram[gone][:, gone]) * lost).sum()


def admm(weight: Tensor, gram: Tensor, kept: Tensor, rho: float = 1.0, iterations: int = 30) -> Tensor:
    """Shen et al. 2024, eq. 7-9, with the corrections that make them converge; shape (out, len(kept)).

    The mask of eq. 8 must keep the kept entries; inputs are scaled to unit norm first, so that rho means something.
    The limit is `closed_form` without damping (tested).
    """
    weight = weight.to(gram.dtype)
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    unit = gram / scale / scale[:, None]
    target = weight * scale
    mask = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)
    mask[kept.to(gram.device)] = 1
    shifted = unit.clone()
    shifted.diagonal().add_(rho)
    lower = factor(shifted)
    z, u = target.clone(), torch.zeros_like(target)
    right = target @ unit
    for _ in range(iterations):
        w = torch.cholesky_solve((right + rho * (z - u)).T, lower).T
        z = (w + u) * mask
        u = u + w - z
    return (z / scale)[:, kept.to(gram.device)]


def greedy_order(weight: Tensor, gram: Tensor, damping: float = 1e-2, block: int = 16) -> Tensor:
    """Inputs in the order of their worth, most important first, by greedy removal with compensation; shape (n,).

    Removes the `block` inputs of least ||w_j||^2 / [H^-1]_jj at a time (Shen et al. 2024, eq. 1), then updates the
    weights and the inverse Gram as if they had been compensated for (optimal brain surgeon; Kurtic et al. 2023,
    ZipLM). The removal order is the nested order, right for every level at once.
    """
    inverse = torch.cholesky_inverse(factor(damped(gram, damping)))
    weight = weight.to(gram.dtype).clone()
    name = torch.arange(len(gram), device=gram.device)  # the input that each column stands for
    alive = torch.ones_like(name, dtype=torch.bool)
    removed: list[Tensor] = []
    left = len(gram)
    while left:
        scores = weight.square().sum(0) / inverse.diagonal()
        scores[~alive] = torch.inf
        gone = scores.topk(min(block, left), largest=False, sorted=True).indices
        rows = inverse[gone]
        step = torch.linalg.solve(rows[:, gone], rows)
        weight.addmm_(weight[:, gone], step, alpha=-1)
        inverse.addmm_(inverse[:, gone], step, alpha=-1)
        alive[gone] = False
        weight[:, gone] = 0
        inverse[gone] = 0
        inverse[:, gone] = 0
        inverse[gone, gone] = 1
        removed.append(name[gone])
        left -= len(gone)
        if left < SHRINK * len(name):  # what is gone would go through every update that is left
            weight, inverse, name = weight[:, alive], inverse[alive][:, alive], name[alive]
            alive = torch.ones_like(name, dtype=torch.bool)
    return torch.cat(removed).flip(0)


def greedy_group_order(weight: Tensor, gram: Tensor, groups: Sequence[Tensor], damping: float = 1e-2) -> Tensor:
    """Groups of inputs (heads, KV groups) in the order of their worth, most important first; shape (len(groups),).

    The same greedy removal with whole groups: score tr[W_S ([H^-1]_SS)^-1 W_S^T].
    """
    inverse = torch.cholesky_inverse(factor(damped(gram, damping)))
    weight = weight.to(gram.dtype).clone()
    left, removed = list(range(len(groups))), []
    while left:
        scores = []
        for g in left:
            s = groups[g]
            lower = factor(inverse[s][:, s])
            scores.append(torch.linalg.solve_triangular(lower, weight[:, s].T, upper=False).square().sum())
        g = left.pop(int(torch.stack(scores).argmin()))
        s = groups[g]
        step = torch.linalg.solve(inverse[s][:, s], inverse[s])
        weight = weight - weight[:, s] @ step
        inverse = inverse - inverse[:, s] @ step
        inverse[s, :] = 0
        inverse[:, s] = 0
        inverse[s, s] = 1
        removed.append(g)
    return torch.tensor(removed[::-1])


def refit(gram: Tensor, cross: Tensor, prior: Tensor, damping: float) -> Tensor:
    """argmin_W ||A W^T - Y||^2 / tokens + ||(W - prior) R^1/2||^2, R = diag(ridge), shape (out, k).

    gram (k, k) = A^T A / tokens, cross (k, out) = A^T Y / tokens: inputs that the compressed prefix really produces,
    outputs that the dense model wants. The ridge pulls towards `prior`, not to zero.
    """
    prior = prior.to(gram.dtype)
    residual = cross - gram @ prior.T
    return prior + torch.cholesky_solve(residual, factor(damped(gram, damping))).T
