"""Weights carried over from refitted neighbours: a network's own come back, and what is cut off is made up for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_levels import prepared
from tiny import CONFIGS, ragged
from torch import Tensor, nn

from prunus.models.families import Family, dims, family_of, full, is_dropped
from prunus.models.rows import layers_of, rows
from prunus.models.slicing import Override, activate, kept_dims, take
from prunus.reforming.levels import Levels
from prunus.reforming.neighbours import Neighbour, inherit
from prunus.scoring.moments import Grams, writer_weight
from prunus.subnetwork import LayerKept, SubNetwork


def shaken(
    model: nn.Module, family: Family, database: Levels, sub: SubNetwork, seed: int = 0
) -> dict[tuple[int, str], Tensor]:
    """Weights of a network as a pass might leave them: its one-shot ones, all of them moved a little."""
    found = {**database(sub)}
    generator = torch.Generator().manual_seed(seed)
    for row in rows(model, family):
        i = row.layer
        if i is None or is_dropped(row.part, sub.layers[i]) or row.part == "block":
            continue
        inside = row.path.removeprefix(f"{family.layers}.{i}.")
        kept = kept_dims(dims(model.config), sub.hidden, sub.layers[i], sub.kept[i] if sub.kept else None)
        start = found.get((i, inside), take(row.parameter.data, row.axes, dims(model.config), kept))
        found[i, inside] = start + 0.05 * torch.randn(start.shape, generator=generator)
    return found


def apart(a: Override, b: Override) -> float:
    """Largest difference between two sets of weights with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("named", [False, True])
def test_the_only_neighbour_gives_its_own_weights_to_a_network_of_its_shape(
    name: str, named: bool, tmp_path: Path
) -> None:
    model, orders, _ = prepared(name, tmp_path)
    family = family_of(model.config)
    database = Levels(model, family, tmp_path, orders=orders)
    sub = ragged(model.config, hidden=False)
    weights = shaken(model, family, database, sub)
    members = tuple(LayerKept(*(tuple(range(n)) for n in vars(shape).values())) for shape in sub.layers)
    near = replace(sub, kept=members if named else ())  # the same network, its members spelled out
    assert apart(inherit(model, family, database, sub, [Neighbour(near, weights, 0.7)], share=1.0), weights) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_between_two_neighbours_stands_the_mean_of_their_changes(name: str, tmp_path: Path) -> None:
    model, orders, _ = prepared(name, tmp_path)
    family, whole = family_of(model.config), full(model.config)
    database = Levels(model, family, tmp_path, orders=orders)
    sub = ragged(model.config, hidden=False)
    a, b = shaken(model, family, database, sub, seed=1), shaken(model, family, database, sub, seed=2)
    found = inherit(model, family, database, sub, [Neighbour(sub, a, 3.0), Neighbour(sub, b, 1.0)], share=1.0)
    assert apart(found, {key: 0.75 * a[key] + 0.25 * b[key] for key in a}) < 1e-4
    plain = inherit(model, family, database, sub, [])
    assert apart(plain, database(sub)) < 1e-6
    halfway = inherit(model, family, database, sub, [Neighbour(sub, a, 1.0), Neighbour(whole, {}, 1.0)], share=1.0)
    for row in rows(model, family):
        key = (row.layer, row.path.removeprefix(f"{family.layers}.{row.layer}."))
        if key in plain:
            assert torch.allclose(halfway[key], (a[key] + plain[key]) / 2, atol=1e-4), key  # type: ignore[index]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_share_of_the_change_is_a_share_of_the_way(name: str, tmp_path: Path) -> None:
    model, orders, _ = prepared(name, tmp_path)
    family = family_of(model.config)
    database = Levels(model, family, tmp_path, orders=orders)
    sub = ragged(model.config, hidden=False)
    near = [Neighbour(sub, shaken(model, family, database, sub), 1.0)]
    none, part, all_ = (inherit(model, family, database, sub, near, share=share) for share in (0.0, 0.25, 1.0))
    assert apart(part, {key: 0.75 * none[key] + 0.25 * all_[key] for key in none}) < 1e-4
    one_shot = database(sub)
    assert apart({key: none[key] for key in one_shot}, one_shot) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
@torch.no_grad()
def test_what_a_wider_neighbour_loses_is_made_up_for(name: str, tmp_path: Path) -> None:
    """Readers are prefixes of the neighbour's; writers come nearer to its outputs than their first columns alone do."""
    model, orders, grams = prepared(name, tmp_path)
    family = family_of(model.config)
    database = Levels(model, family, tmp_path, orders=orders, damping=1e-6)
    wide = full(model.config)
    sub = replace(wide, layers=tuple(replace(shape, mlp=shape.mlp // 2) for shape in wide.layers))
    weights = shaken(model, family, database, wide)
    found = inherit(model, family, database, sub, [Neighbour(wide, weights, 1.0)], share=1.0)
    for i, layer in enumerate(layers_of(model, family)):
        path = family.mlp_writer
        with activate(model, family, wide, weights):
            aim = writer_weight(layer, path).clone()
        with activate(model, family, sub, found):
            new = writer_weight(layer, path).clone()
        assert error(aim, new, grams[i]) < 0.9 * error(aim, aim[:, : new.shape[1]], grams[i])
        assert new.shape[1] == sub.layers[i].mlp


def error(aim: Tensor, new: Tensor, grams: Grams) -> float:
    """Mean squared distance between the outputs of two writers, the second one with fewer inputs."""
    lost = aim.clone()
    lost[:, : new.shape[1]] -= new
    return float(((lost @ grams.mlp) * lost).sum())
