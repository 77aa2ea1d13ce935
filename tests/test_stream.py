"""The layer-by-layer forward is the model's own forward, for every family, also under `activate`."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, ragged, tiny, tokens

from prunus.models.families import family_of
from prunus.models.slicing import activate
from prunus.models.stream import LayerStream, inputs_of


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_stream_is_the_models_own_forward(name: str) -> None:
    model, ids = tiny(name), tokens()
    family = family_of(model.config)
    stream = LayerStream(model, family)
    expected = model(ids, use_cache=False).logits
    assert torch.equal(stream.logits(stream.run_from(0, stream.embed(ids))), expected)
    sub = ragged(model.config)
    with activate(model, family, sub):
        expected = model(ids, use_cache=False).logits
        hidden = stream.run(0, stream.embed(ids))
        assert torch.equal(stream.logits(stream.run_from(1, hidden)), expected)


@torch.no_grad()
def test_a_new_batch_shape_is_recorded_on_its_own() -> None:
    model = tiny("gemma2")
    stream = LayerStream(model, family_of(model.config))
    stream.embed(tokens(2, 17))
    ids = tokens(3, 9, seed=4)
    hidden = stream.model.base_model.embed_tokens(ids)
    out = stream.logits(stream.run_from(0, hidden))
    assert torch.equal(out, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_inputs_are_seen_and_hooks_leave() -> None:
    model = tiny("llama")
    family = family_of(model.config)
    stream = LayerStream(model, family)
    hidden = stream.embed(tokens())
    with inputs_of(stream.layers[0], family.attention_writer, family.mlp_writer) as seen:
        stream.run(0, hidden)
    assert seen[family.attention_writer].shape == (2, 17, 64)
    assert seen[family.mlp_writer].shape == (2, 17, 80)
    assert not stream.layers[0].get_submodule(family.mlp_writer)._forward_pre_hooks
