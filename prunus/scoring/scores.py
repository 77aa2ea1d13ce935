"""Floor 1: the formulas behind importance scores. Tensors in, tensors out; no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.models.families import AXES, size_of

Aggregator = Literal[
    "mean",
    "norm",
    "norm-mean",
    "mean-norm",
    "variance",
    "variance-norm",
    "variance-mean",
    "mean-variance",
    "norm-variance",
]


def by_unit(values: Tensor, axis: str, whole: Mapping[str, int]) -> dict[str, Tensor]:
    """Scores of an axis' members, summed into its units: hidden (H,), mlp (I,), kv_heads (G,), q_per_kv (G, R).

    values: (n,) along the axis, which may be a sum of axes (fused weights). A query head gets what is its own; a
    group gets that of its keys, values and query heads.
    """
    found: dict[str, Tensor] = {}
    start = 0
    for part in axis.split("+"):
        n, factors = size_of(part, whole), AXES[part]
        piece = values[start : start + n].view([whole[f] for f in factors])
        start += n
        units: dict[str, Tensor] = {}
        if factors[0] in ("hidden", "mlp"):
            units[factors[0]] = piece
        if factors[0] == "kv_heads":
            units["kv_heads"] = piece.flatten(1).sum(1)
        if factors[:2] == ("kv_heads", "q_per_kv"):
            units["q_per_kv"] = piece.flatten(2).sum(2)
        for unit, value in units.items():
            found[unit] = found[unit] + value if unit in found else value
    return found


def obs(weight: Tensor, scale: Tensor) -> Tensor:
    """Score of every weight by the error its removal makes: W_ij^2 / [(2 X X^T)^-1]_jj; Shen et al. 2024, eq. 1.

    weight: (out, in). scale: (in,), from `curvature`. Returns (out, in) in the precision of scale.
    """
    return weight.to(scale.dtype) ** 2 * scale


def curvature(gram: Tensor, damping: float = 0.01) -> Tensor:
    """1 / diag((2 (G + damping mean(diag G) I))^-1), (in,): in float64, above 2048 inputs in float32.

    gram: (in, in), X X^T / tokens; the constant factor changes no order. Raises UserError where it stays singular.
    """
    if not bool(torch.isfinite(gram).all()):
        raise UserError("a Gram matrix holds NaN or infinite values: activations overflow in this dtype; use float32")
    g = 2 * (gram.double() if gram.shape[0] <= 2048 else gram.float())
    diagonal = g.diagonal()
    diagonal += damping * diagonal.mean() + torch.finfo(torch.float32).tiny
    factor, failed = torch.linalg.cholesky_ex(g)
    if bool(failed):
        raise UserError(
            f"a Gram matrix of {gram.shape[0]} inputs is singular with damping {damping}; use more calibration tokens "
            "than inputs, or more damping (0.01 is usual)"
        )
    inverse: Tensor = torch.cholesky_inverse(factor).diagonal()
    return 1 / inverse


def wanda(weight: Tensor, square: Tensor) -> Tensor:
    """|W_ij| times the root mean square of input j; weight: (out, in), square: (in,) mean of x_j^2."""
    return weight.double().abs() * square.double().sqrt()


@dataclass
class Sums:
    """Sums over tokens of one activation's units, float64."""

    n: int = 0
    absolute: Tensor | float = 0.0
    plain: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def add(self, x: Tensor, dim: int) -> Sums:
        """Take in more tokens, which lie along `dim`."""
        x = x if x.dtype == torch.float64 else x.float()
        self.n += x.shape[dim]
        self.absolute = self.absolute + x.abs().sum(dim, dtype=torch.float64)
        self.plain = self.plain + x.sum(dim, dtype=torch.float64)
        self.square = self.square + (x * x).sum(dim, dtype=torch.float64)
        return self

    def gathered(self, how: str) -> Tensor:
        """mean of |x|, norm of x, or unbiased variance of x."""
        if how == "mean":
            value = self.absolute / self.n
        elif how == "norm":
            value = self.square**0.5
        else:
            value = (self.square - self.plain**2 / self.n) / (self.n - 1)
        assert isinstance(value, Tensor)
        return value.clamp_min(0) if how == "variance" else value


def gathered(x: Tensor, aggregator: Aggregator, two_levels: bool) -> Tensor:
    """Activations (sequences, tokens, units) -> one number per unit, as Sukthanker et al. gather them.

    "outer-inner": inner over the tokens of a sequence, outer over the sequences; one word means both. Without two
    levels (neurons, hidden channels) all tokens count as one sequence. mean is of absolute values, norm is L2.
    """
    outer, inner = levels(aggregator)
    if not two_levels:
        return one_level(Sums().add(x.flatten(0, 1), 0), aggregator)
    return Sums().add(Sums().add(x, 1).gathered(inner), 0).gathered(outer)


def levels(aggregator: str) -> tuple[str, str]:
    """Outer and inner aggregation that the name of an aggregator means."""
    outer, _, inner = aggregator.partition("-")
    return outer, inner or outer


def one_level(sums: Sums, aggregator: str) -> Tensor:
    """What an aggregator makes of tokens that count as one sequence."""
    outer, inner = levels(aggregator)
    return Sums().add(sums.gathered(inner)[None], 0).gathered(outer)
