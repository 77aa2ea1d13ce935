"""From errors to nats: curves follow the errors, measured levels correct where they mislead, costs add up."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny, tokens

from prunus.models.costs import layout, parameters
from prunus.models.families import dims, family_of, full
from prunus.models.slicing import activate
from prunus.models.stream import LayerStream
from prunus.reforming.levels import Errors
from prunus.reforming.sensitivity import (
    Anchor,
    believing,
    curves,
    factors,
    measure,
    predict,
    subnetwork_of,
    with_level,
)
from prunus.searching.allocate import allocate
from prunus.searching.objective import Divergence
from prunus.searching.space import space_of


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny("llama")


def errors_of(model: torch.nn.Module) -> Errors:
    """Made-up errors: what is dropped, in heads and neurons, weighed differently in every layer."""
    d = dims(model.config)
    heads = torch.arange(d["kv_heads"] + 1)[:, None] * torch.arange(d["q_per_kv"] + 1)
    weight = torch.tensor([4.0, 1.0, 2.0, 3.0])
    attention = weight[:, None, None] * (heads.max() - heads)
    mlp = weight[:, None] * (d["mlp"] - torch.arange(d["mlp"] + 1)) / 10
    return Errors(attention.float(), mlp.float())


def test_curves_are_half_the_error_and_their_costs_add_up(model: torch.nn.Module) -> None:
    family, errors = family_of(model.config), errors_of(model)
    own, space = layout(model, family), space_of(model.config, mlp_step=16)
    found = curves(errors, [], own, space, 48)
    assert [(c.layer, c.which) for c in found] == [(i, w) for i in range(4) for w in ("attention", "mlp")]
    for c in found:
        assert c.nats[0] == 0
        for level, nats in zip(c.levels, c.nats, strict=True):
            error = errors.attention[c.layer][level] if c.which == "attention" else errors.mlp[c.layer, level]
            assert nats == pytest.approx(float(error) / 2)
    sub = subnetwork_of(found, [1] * len(found), 48)
    assert sum(c.costs[1] for c in found) == parameters(own, sub, "blocks")
    assert predict(found, sub) == pytest.approx(sum(c.nats[1] for c in found))


def test_a_misleading_sub_layer_is_corrected_and_noise_only_by_half() -> None:
    anchors = [
        Anchor(0, "attention", error=0.2, nats=0.1),  # as predicted
        Anchor(1, "attention", error=0.2, nats=0.15),  # 1.5 times: believed by half
        Anchor(2, "mlp", error=0.2, nats=1.6),  # 16 times: believed but for half of a factor of two
        Anchor(3, "mlp", error=0.0, nats=0.0),  # says nothing
    ]
    found = factors(anchors)
    assert found[0, "attention"] == pytest.approx(1)
    assert found[1, "attention"] == pytest.approx(math.sqrt(1.5))
    assert found[2, "mlp"] == pytest.approx(16 / math.sqrt(2))
    assert (3, "mlp") not in found


def test_belief_goes_from_the_errors_alone_to_the_measured_levels(model: torch.nn.Module) -> None:
    own, space, errors = layout(model, family_of(model.config)), space_of(model.config, mlp_step=16), errors_of(model)
    anchors = [Anchor(1, "mlp", 1.0, 8.0), Anchor(2, "attention", 1.0, 0.01)]
    with_them, without = curves(errors, anchors, own, space, 48), curves(errors, [], own, space, 48)
    for belief, want in ((1.0, with_them), (0.0, without)):
        for got, right in zip(believing(with_them, factors(anchors), belief), want, strict=True):
            assert got.nats == pytest.approx(right.nats)
            assert (got.layer, got.which, got.levels, got.costs) == (
                right.layer,
                right.which,
                right.levels,
                right.costs,
            )
    half = believing(with_them, factors(anchors), 0.5)[3]  # the MLP of layer 1
    assert half.nats[1:] == pytest.approx(
        [math.sqrt(a * b) for a, b in zip(with_them[3].nats, without[3].nats, strict=True)][1:]
    )


def test_the_knapsack_spares_what_is_dear(model: torch.nn.Module) -> None:
    family = family_of(model.config)
    own, space = layout(model, family), space_of(model.config, mlp_step=16)
    found = curves(errors_of(model), [], own, space, 48)
    answer = allocate([c.costs for c in found], [c.nats for c in found], 0.7 * parameters(own, full(model.config)))
    sub = subnetwork_of(found, answer.levels, 48)
    assert sub.layers[0].mlp >= sub.layers[3].mlp >= sub.layers[2].mlp >= sub.layers[1].mlp
    assert sub.layers[1].mlp < sub.layers[0].mlp
    assert parameters(own, sub) <= 0.7 * parameters(own, full(model.config))


@torch.no_grad()
def test_measured_levels_are_the_divergence_of_one_changed_sub_layer(model: torch.nn.Module) -> None:
    family, ids = family_of(model.config), tokens(3, 17)
    objective = Divergence(LayerStream(model, family), ids, windows=(3,), stride=1)
    space, whole = space_of(model.config, mlp_step=16), full(model.config)
    anchors = measure(objective, whole, space, errors_of(model), range(3))
    assert len(anchors) == 8
    level = space.mlp[2][len(space.mlp[2]) // 2]
    sub = with_level(whole, 2, level)
    dense = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    with activate(model, family, sub):
        other = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    kl = float((dense.exp() * (dense - other)).sum(-1).mean())
    (found,) = [a for a in anchors if (a.layer, a.which) == (2, "mlp")]
    assert found.nats == pytest.approx(kl, rel=1e-3)
