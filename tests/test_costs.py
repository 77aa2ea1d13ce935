"""Laws of the counts: from shapes alone, and equal to what extraction really leaves."""

from __future__ import annotations

import time

import pytest
import torch
from tiny import CONFIGS, indexed, ragged, tiny, tokens
from transformers import AutoModelForCausalLM, LlamaConfig

from prunus.models.costs import (
    cache_bytes,
    decode_bytes,
    flops,
    layout,
    memory_bytes,
    n_bytes,
    parameters,
    sublayer_parameters,
)
from prunus.models.families import dims, family_of, full
from prunus.models.slicing import extract, state_of
from prunus.subnetwork import LayerShape, SubNetwork


def _without_tied(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not model.config.tie_word_embeddings:  # type: ignore[union-attr]
        return state
    return {path: t for path, t in state.items() if path not in ("lm_head.weight", "embed_out.weight")}


def _subs(config: object) -> list[SubNetwork]:
    whole = full(config)
    no_layer = SubNetwork(whole.hidden, (whole.layers[0], LayerShape(0, 0, 0), *whole.layers[2:]))
    return [whole, ragged(config), ragged(config, 1, hidden=False), indexed(config), no_layer]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_extracted_state(name: str) -> None:
    model = tiny(name)
    family = family_of(model.config)
    built = layout(model, family)
    for sub in _subs(model.config):
        state = _without_tied(model, state_of(model, family, sub))
        inside = {path: t for path, t in state.items() if path.startswith(family.layers + ".")}
        assert parameters(built, sub, "all") == sum(t.numel() for t in state.values())
        assert parameters(built, sub, "blocks") == sum(t.numel() for t in inside.values())
    assert parameters(built, full(model.config), "all") == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_without_weights_has_the_same_layout(name: str) -> None:
    model = tiny(name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS[name]())
    family = family_of(model.config)
    assert layout(empty, family).entries == layout(model, family).entries
    assert layout(empty, family).sizes == layout(model, family).sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_the_sum_of_their_sublayers(name: str) -> None:
    model = tiny(name)
    built = layout(model, family_of(model.config))
    for sub in _subs(model.config):
        total = 0
        for i, shape in enumerate(sub.layers):
            for part in ("attention", "mlp", "block"):
                total += sublayer_parameters(built, i, part, shape, sub.hidden)
        assert total == parameters(built, sub, "blocks")
    assert sublayer_parameters(built, 1, "attention", LayerShape(0, 0, 5), 48) == 0
    assert sublayer_parameters(built, 1, "mlp", LayerShape(1, 1, 0), 48) == 0


def test_adapters_are_not_counted() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny("llama")
    family = family_of(model.config)
    before = layout(model, family)
    inject_adapter_in_model(LoraConfig(r=3, target_modules=list(family.linear_names)), model)
    assert layout(model, family).entries == before.entries


def _smollm2() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )


def test_known_figures_of_smollm2_135m() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_smollm2())
    built, whole = layout(model, family_of(model.config)), full(model.config)
    assert parameters(built, whole, "all") == 134_515_008
    assert parameters(built, whole, "blocks") == 134_515_008 - 49152 * 576 - 576
    assert n_bytes(built, whole) == 2 * 134_515_008
    assert sublayer_parameters(built, 7, "attention", whole.layers[7], 576) == 576 * (2 * 576 + 2 * 192) + 576
    # by hand: per token and layer 4 attention and 3 MLP matrices, then the tied output matrix; QK and AV squares
    layer = 576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536
    expected = 2 * 128 * (30 * layer + 49152 * 576) + 30 * 4 * 128 * 128 * 9 * 64
    assert flops(built, whole, 128) == expected
    assert flops(built, whole, 128, batch=3) == 3 * expected
    assert flops(built, whole, 128, of="blocks") == expected - 2 * 128 * 49152 * 576
    cache = 30 * 2 * 3 * 64 * 1000
    assert decode_bytes(built, whole, 1000) == 2 * (30 * layer + 49152 * 576 + cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_cutting_anything_never_costs_more(name: str) -> None:
    model = tiny(name)
    built, d = layout(model, family_of(model.config)), dims(model.config)
    whole = full(model.config)
    units = {"kv_heads": d["kv_heads"], "q_per_kv": d["q_per_kv"], "mlp": d["mlp"]}
    smaller = [SubNetwork(d["hidden"] - 1, whole.layers)]
    for unit, n in units.items():
        if n > 1:
            cut = LayerShape(**{**units, unit: n - 1})
            smaller.append(SubNetwork(d["hidden"], (*whole.layers[:-1], cut)))
    for sub in smaller:
        assert parameters(built, sub, "blocks") < parameters(built, whole, "blocks")
        assert flops(built, sub, 9) < flops(built, whole, 9)
        assert decode_bytes(built, sub, 9) < decode_bytes(built, whole, 9)


def test_a_thousand_candidates_of_thirty_layers_in_a_second() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_smollm2())
    built = layout(model, family_of(model.config))
    subs = [SubNetwork(576, (LayerShape(1 + n % 3, 1 + n % 2, 1 + n),) * 30) for n in range(500)]
    best = float("inf")  # of three, because machines are shared
    for _ in range(3):
        start = time.perf_counter()
        for sub in subs:
            parameters(built, sub)
        best = min(best, time.perf_counter() - start)
    assert best < 0.5


def test_a_subnetwork_of_another_depth_is_an_error() -> None:
    model = tiny("llama")
    built = layout(model, family_of(model.config))
    with pytest.raises(ValueError, match="3 layers"):
        parameters(built, SubNetwork(48, (LayerShape(1, 1, 1),) * 3))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_is_counted_as_it_is(name: str) -> None:
    """A forward of 7 tokens for 3 sequences leaves just these keys and values."""
    model = tiny(name)
    family, whole = family_of(model.config), full(model.config)
    built = layout(model, family)
    one_group = SubNetwork(whole.hidden, (LayerShape(1, whole.layers[0].q_per_kv, 5),) * 4)
    for sub in (whole, one_group, _subs(model.config)[-1]):
        small = extract(model, family, sub)
        with torch.no_grad():
            cache = small(tokens(3, 7), use_cache=True).past_key_values
        found = sum(t.numel() * t.element_size() for one in cache.layers for t in (one.keys, one.values))
        assert cache_bytes(built, sub, 7, batch=3, bytes_per_parameter=4) == found
        weights = sum(p.numel() * p.element_size() for p in small.parameters())
        assert memory_bytes(built, sub, 7, batch=3, bytes_per_parameter=4) == found + weights


def test_sliding_windows_keep_no_more_than_theirs() -> None:
    model = tiny("gemma2")  # two of four layers look back on 8 tokens
    built = layout(model, family_of(model.config))
    assert built.windows == (8, None, 8, None)
    sub = SubNetwork(48, tuple(LayerShape(kv, 1, 5) for kv in (1, 2, 3, 4)))
    assert cache_bytes(built, sub, 20, bytes_per_parameter=1) == 2 * 8 * (8 * (1 + 3) + 20 * (2 + 4))
    dropped = SubNetwork(48, (sub.layers[0], LayerShape(0, 0, 5), *sub.layers[2:]))
    assert cache_bytes(built, dropped, 20, bytes_per_parameter=1) == 2 * 8 * (8 * (1 + 3) + 20 * 4)
