"""Floor 1: losses of training: cross entropy, and divergences of a student from its teacher. Tensors in, tensors out.

All take logits (n, vocab) and give one value for each of n positions, in nats, computed in float32.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "js"]
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "js")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label): logits (n, vocab), labels (n,) -> (n,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student), both softened by T (Hinton et al. 2015, arXiv:1503.02531, sec. 2)."""
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher): the student keeps to the teacher's modes (Gu et al. 2024, arXiv:2306.08543)."""
    return forward_kl(teacher, student, temperature)


def js(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the Jensen-Shannon divergence: the mean KL of both from their average; at most T^2 log 2."""
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    middle = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
    both = F.kl_div(middle, log_p, reduction="none", log_target=True) + F.kl_div(
        middle, log_q, reduction="none", log_target=True
    )
    return both.sum(-1) / 2 * temperature**2


def divergence(kind: Divergence, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The named divergence; only the student gets a gradient."""
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": js}[kind](student, teacher.detach(), temperature)


__all__ = ["DIVERGENCES", "Divergence", "cross_entropy", "divergence", "forward_kl", "js", "reverse_kl"]
