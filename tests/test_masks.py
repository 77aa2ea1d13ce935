"""Masks: N:M patterns, Wanda and SparseGPT on matrices small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rivals_by_hand import written_down
from tiny import tiny, tokens

from prunus.baselines.mask_magnitude import kept_of_matrices, matrices, n_m_mask, top_of
from prunus.baselines.mask_sparsegpt import factor, sparse
from prunus.baselines.subject import Subject
from prunus.baselines.table import TABLE
from prunus.errors import UserError


def test_two_of_four() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0]])
    assert n_m_mask(scores, (2, 4)).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert n_m_mask(scores, (1, 2)).int().tolist() == [[0, 1, 1, 0, 1, 0, 1, 0]]
    with pytest.raises(UserError, match="multiple of 4; a matrix has 6"):
        n_m_mask(torch.ones(1, 6), (2, 4))
    assert top_of(torch.tensor([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]]), 2 / 3).int().tolist() == [[0, 1, 1], [1, 1, 0]]


def test_magnitude_keeps_the_largest_weights_of_a_matrix_wherever_they_stand() -> None:
    """Blocks of 304 parameters, 16 of them norms: 160 leave half of every matrix, and 232 three quarters.

    Rows of the matrix keep 4, 1, 3 and 0 of their weights, 8 of 16, then 4, 1, 3 and 4; signs do not matter.
    """
    model = written_down()
    up = torch.tensor([[-9.0, 8, -7, 6], [0.1, -5, 0.2, 0.3], [4, -3, 2, -0.4], [0.5, -0.6, 0.7, -0.8]])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(up)
        for parameter in model.model.layers[0].parameters():
            parameter.fill_(-1.0)  # all alike: of equal ones the first stay
    s = Subject(model, torch.arange(4)[:, None])
    assert s.blocks == 304
    half: Any = TABLE["mask-magnitude"].run(s, 160 / 304).model
    assert half.model.layers[1].mlp.up_proj.weight.tolist() == [[-9, 8, -7, 6], [0, -5, 0, 0], [4, -3, 2, 0], [0] * 4]
    assert half.model.layers[0].mlp.down_proj.weight.tolist() == [[-1] * 4, [-1] * 4, [0] * 4, [0] * 4]
    assert half.model.layers[0].input_layernorm.weight.tolist() == [-1] * 4  # norms are no matrices
    most: Any = TABLE["mask-magnitude"].run(s, 232 / 304).model
    kept = torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.equal(most.model.layers[1].mlp.up_proj.weight, up * kept)
    of_four: Any = TABLE["mask-magnitude-2:4"].run(s, 0.5).model
    kept = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    assert torch.equal(of_four.model.layers[1].mlp.up_proj.weight, up * kept)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, up)


def test_the_share_of_the_matrices_makes_up_for_norms() -> None:
    s = Subject(tiny("llama"), tokens(2, 16))
    inside = sum(w.numel() for _, w in matrices(s.model, s.family))
    share = kept_of_matrices(s, 0.6)
    assert s.blocks - inside == 4 * 2 * 48
    assert share * inside + 4 * 2 * 48 == pytest.approx(0.6 * s.blocks, abs=1)
    with pytest.raises(UserError, match="norms and biases"):
        kept_of_matrices(s, 0.004)


def test_sparsegpt_moves_what_is_lost_to_the_right() -> None:
    """Without damping, removing input 0 of two adds w_0 G_01 / G_11 to input 1: the least-squares answer."""
    gram = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    new = sparse(torch.tensor([[1.0, 3.0]]), upper, 0.5)
    assert new[0, 0] == 0
    assert float(new[0, 1]) == pytest.approx(3 + 1 * 0.5 / 2)
    last = sparse(torch.tensor([[3.0, 0.1]]), upper, 0.5)  # nothing is to the right of the last input
    assert last[0].tolist() == pytest.approx([3.0, 0.0])


def test_sparsegpt_with_inputs_that_do_not_correlate_is_magnitude_pruning() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    upper = factor(torch.eye(32))
    for pattern in (None, (2, 4)):
        new = sparse(weight, upper, 0.5, pattern, block=8)
        if pattern:
            kept = n_m_mask(weight.abs(), pattern)
        else:
            kept = torch.cat([top_of(b.abs().flatten()[None], 0.5).view(6, 8) for b in weight.split(8, 1)], 1)
        assert torch.equal(new, weight * kept)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_loses_less_than_the_same_mask_alone(pattern: Any) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 48, generator=g) @ torch.randn(48, 48, generator=g)
    gram, weight = x.T @ x / 400, torch.randn(20, 48, generator=g)
    upper = factor(gram)
    new = sparse(weight, upper, 0.5, pattern, block=16)
    whole = sparse(weight, upper, 0.5, pattern, block=48)
    assert float((new == 0).float().mean()) == pytest.approx(0.5)
    assert float((whole == 0).float().mean()) == pytest.approx(0.5)

    def lost(w: torch.Tensor) -> float:
        return float(((w - weight) @ x.T).square().sum())

    assert lost(new) < 0.7 * lost(weight * (new != 0))
    if pattern:
        assert bool((new.view(20, 12, 4) == 0).sum(-1).eq(2).all())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masks_have_the_zeros_that_were_asked_for(method: str, name: str) -> None:
    s = Subject(tiny(name), tokens(4, 32))
    share = kept_of_matrices(s, 0.6)
    found = TABLE[f"mask-{method}"].run(s, 0.6)
    half = TABLE[f"mask-{method}-2:4"].run(s, 0.5)
    for (_, weight), (_, two) in zip(matrices(found.model, s.family), matrices(half.model, s.family), strict=True):
        kept = (weight != 0).float()
        assert float(kept.mean()) == pytest.approx(share, abs=0.02)
        if method == "wanda":
            assert len({int(row.sum()) for row in kept}) == 1  # every row alike
        assert bool((two.reshape(-1, 4) != 0).sum(1).eq(2).all())


def test_wanda_prefers_loud_inputs() -> None:
    """With all weights alike, a row keeps the inputs of the greatest norm."""
    model: Any = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(0.1)
    s = Subject(model, tokens(4, 32))
    found: Any = TABLE["mask-wanda"].run(s, 0.6).model
    layer = model.model.layers[0]
    read = layer.input_layernorm(model.model.embed_tokens(s.ids)).flatten(0, 1).square().mean(0)
    kept = found.model.layers[0].self_attn.q_proj.weight[0] != 0
    assert set(kept.nonzero()[:, 0].tolist()) == set(read.argsort(descending=True)[: int(kept.sum())].tolist())
