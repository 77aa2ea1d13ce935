"""Losses are their definitions, and the head's pieces give the gradients of the whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny, tokens

from prunus.models import heads
from prunus.training.losses import DIVERGENCES, cross_entropy, divergence


def logits(seed: int, n: int = 5) -> torch.Tensor:
    return torch.randn(n, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_their_sums(kind: Any, temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    q, p = (torch.softmax(x / temperature, -1) for x in (student, teacher))
    m = (p + q) / 2

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    wanted = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[kind]
    found = divergence(kind, student, teacher, temperature)
    assert torch.allclose(found.double(), wanted * temperature**2, atol=1e-6)
    assert torch.allclose(divergence(kind, student, student, temperature), torch.zeros(5), atol=1e-6)


def test_the_jensen_shannon_divergence_is_symmetric_and_bounded() -> None:
    a, b = logits(0) * 100, logits(1) * 100
    assert torch.allclose(divergence("js", a, b), divergence("js", b, a), atol=1e-6)
    assert float(divergence("js", a, b).max()) <= math.log(2) + 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_only_the_student_gets_a_gradient(kind: Any) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    divergence(kind, student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("numbers", [97 * 3, 2**22])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(
    name: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(heads.PIECE, "cpu", numbers)
    monkeypatch.setitem(heads.GROUP, "cpu", 2 * numbers)
    model: Any = tiny(name)
    ids = tokens(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()

    def measure(some: torch.Tensor, first: int) -> torch.Tensor:
        return cross_entropy(some, targets[first : first + len(some)]).sum()

    loss = heads.summed_loss(heads.head_of(model), hidden, measure)
    with torch.no_grad():
        assert float(heads.summed_loss(heads.head_of(model), hidden, measure)) == pytest.approx(float(loss), rel=1e-6)
    (loss / len(targets)).backward()
    assert float(loss) / len(targets) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert torch.allclose(found[key], gradient, atol=1e-5 + 1e-4 * float(gradient.abs().max())), key
