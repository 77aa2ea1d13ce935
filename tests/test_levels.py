"""Levels: what the database predicts is what an activated candidate does, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, indexed, ragged, tiny, tokens

from prunus.models.families import dims, family_of, full
from prunus.models.slicing import activate, extract, layers_of, sort
from prunus.models.stream import LayerStream, inputs_of
from prunus.reforming.levels import Levels, layer_errors, order_layer, permute_grams, save_grams
from prunus.scoring.moments import Grams, collect, writer_weight
from prunus.subnetwork import SubNetwork


def prepared(name: str, folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[int, Grams]]:
    """A sorted tiny model, its orders, and its Grams in the sorted order."""
    model, ids = tiny(name), tokens(12, 17)
    family, d = family_of(model.config), dims(model.config)
    grams: dict[int, Grams] = {}
    collect(LayerStream(model, family), ids, grams.__setitem__)
    rows = []
    for i, layer in enumerate(layers_of(model, family)):
        save_grams(grams[i], folder, i)
        weights = writer_weight(layer, family.attention_writer), writer_weight(layer, family.mlp_writer)
        rows.append(order_layer(grams[i], *weights, d, damping=1e-2, block=4))
    orders = {unit: torch.stack([row[unit] for row in rows]) for unit in rows[0]}
    sort(model, family, orders)
    return model, orders, {i: permute_grams(grams[i], rows[i], d) for i in grams}


@pytest.mark.parametrize("name", CONFIGS)
def test_permuted_grams_are_the_grams_of_the_sorted_model(name: str, tmp_path: Path) -> None:
    model, _, grams = prepared(name, tmp_path)
    again: dict[int, Grams] = {}
    collect(LayerStream(model, family_of(model.config)), tokens(12, 17), again.__setitem__)
    for i, gram in grams.items():
        assert torch.allclose(gram.attention, again[i].attention, atol=1e-3)
        assert torch.allclose(gram.mlp, again[i].mlp, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_predicted_errors_are_the_errors_of_the_activated_writers(name: str, tmp_path: Path) -> None:
    """The error curve of a level equals the squared change of the writer's output on the calibration tokens."""
    model, orders, grams = prepared(name, tmp_path)
    family, d, ids = family_of(model.config), dims(model.config), tokens(12, 17)
    stream, layer = LayerStream(model, family), layers_of(model, family)[0]
    damping = 1e-6
    database = Levels(model, family, tmp_path, orders=orders, damping=damping)
    weights = writer_weight(layer, family.attention_writer), writer_weight(layer, family.mlp_writer)
    attention, mlp = layer_errors(grams[0], *weights, d, damping)
    whole = full(model.config)
    hidden = stream.embed(ids)
    for shape, which, path, predicted in (
        ((max(1, d["kv_heads"] // 2), d["q_per_kv"], d["mlp"]), "attention", family.attention_writer, None),
        ((d["kv_heads"], d["q_per_kv"], 23), "mlp", family.mlp_writer, mlp[23]),
    ):
        sub = SubNetwork(whole.hidden, (type(whole.layers[0])(*shape), *whole.layers[1:]))
        if predicted is None:
            predicted = attention[shape[0], shape[1]]

        def output() -> torch.Tensor:
            caught: list[torch.Tensor] = []
            hook = layer.get_submodule(path).register_forward_hook(lambda _, __, out: caught.append(out))  # noqa: B023
            stream.run(0, hidden)
            hook.remove()
            return caught[0].flatten(0, -2)

        if which == "mlp" and not family.parallel:  # compare on the same inputs
            with inputs_of(layer, path):
                dense = output()
        else:
            dense = output()
        with activate(model, family, sub, database(sub)):
            error = float((output() - dense).square().sum(1).mean())
        if which == "attention" and name == "olmo2":
            continue  # its query and key norms span the heads: cutting some changes the others
        assert error == pytest.approx(float(predicted), rel=0.02, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@torch.no_grad()
def test_reformed_candidates_extract_as_they_are_activated(name: str, tmp_path: Path) -> None:
    model, orders, _ = prepared(name, tmp_path)
    family, ids = family_of(model.config), tokens()
    database = Levels(model, family, tmp_path, orders=orders)
    for sub in (ragged(model.config, hidden=False), indexed(model.config)):
        weights = database(sub)
        with activate(model, family, sub, weights):
            expected = model(ids, use_cache=False).logits
        assert torch.equal(extract(model, family, sub, weights)(ids, use_cache=False).logits, expected)


def test_the_cache_forgets_and_the_whole_needs_no_weights(tmp_path: Path) -> None:
    model, orders, _ = prepared("llama", tmp_path)
    family = family_of(model.config)
    small = Levels(model, family, tmp_path, orders=orders, cache_bytes=1)
    plenty = Levels(model, family, tmp_path, orders=orders)
    sub = ragged(model.config, hidden=False)
    first, second = small(sub), plenty(sub)
    assert all(torch.equal(first[key], second[key]) for key in second)
    assert len(small._cache) == 1
    plenty.forget()
    assert not plenty._cache
    assert plenty._room == Levels(model, family, tmp_path, orders=orders)._room
    assert plenty(full(model.config)) == {}


@pytest.mark.parametrize("method", ["admm", "none"])
def test_other_methods(method: str, tmp_path: Path) -> None:
    model, orders, _ = prepared("llama", tmp_path)
    family = family_of(model.config)
    sub = ragged(model.config, hidden=False)
    exact = Levels(model, family, tmp_path, orders=orders, damping=0.0)(sub)
    other = Levels(model, family, tmp_path, orders=orders, method=method, iterations=3000)(sub)
    if method == "none":
        assert other == {}
    else:
        assert all(torch.allclose(other[key], exact[key], atol=2e-2) for key in exact)
