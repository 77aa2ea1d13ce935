"""Nested: sub-networks that are reformed while they train are the reformed ones, and the whole weight learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_levels import prepared
from tiny import CONFIGS, ragged, tokens

from prunus.models.families import family_of, full
from prunus.models.slicing import activate
from prunus.reforming.levels import Levels
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.training import adapters
from prunus.training.nested import Nested

DAMPING = 1e-2


def made(name: str, folder: Path, rank: int = 0) -> tuple[Any, Levels, Nested, SubNetwork]:
    """A sorted tiny model, its database, what is tested, and a ragged sub-network of the full hidden size."""
    model, orders, _ = prepared(name, folder)
    family = family_of(model.config)
    database = Levels(model, family, folder, orders=orders, damping=DAMPING)
    if rank:
        adapters.attach(model, family, rank=rank)
    return model, database, Nested(model, family, database), ragged(model.config, hidden=False)


def logits(model: Any, sub: SubNetwork, override: Any) -> torch.Tensor:
    with activate(model, family_of(model.config), sub, override):
        found: torch.Tensor = model(tokens()).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_they_are_the_reformed_networks(name: str, tmp_path: Path) -> None:
    model, database, nested, sub = made(name, tmp_path)
    ours, theirs = nested(sub), database(sub)
    assert ours.keys() == theirs.keys() and ours
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=1e-4), key
    assert torch.allclose(logits(model, sub, ours), logits(model, sub, theirs), atol=1e-3)
    plain = logits(model, sub, {})
    assert not torch.allclose(logits(model, sub, ours), plain, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_what_was_omitted_learns_through_what_carries_it(name: str, tmp_path: Path) -> None:
    """The gradient at an omitted column is the kept columns' gradient through T, and the bias's through its mean."""
    model, _, nested, sub = made(name, tmp_path)
    family = family_of(model.config)
    module = model.get_submodule(f"{family.layers}.0.{family.mlp_writer}")
    level = nested.level(0, "mlp", sub.layers[0])
    logits(model, sub, nested(sub)).square().sum().backward()
    grad = module.weight.grad if isinstance(module, torch.nn.Linear) else module.weight.grad.T
    expected = grad[:, level.kept] @ level.carried.T
    if module.bias is not None:
        expected = expected + torch.outer(module.bias.grad, level.mean)
    assert float(expected.abs().max()) > 0
    assert torch.allclose(grad[:, level.gone], expected, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_adapters_are_carried_as_if_they_were_merged(name: str, tmp_path: Path) -> None:
    model, _, nested, sub = made(name, tmp_path, rank=2)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    apart = logits(model, sub, nested(sub))
    family = family_of(model.config)
    adapters.merge(model)
    merged = Nested(model, family, nested.database)(sub)
    assert torch.allclose(apart, logits(model, sub, merged), atol=1e-3)


@torch.no_grad()
def test_a_small_cache_forgets_and_computes_again(tmp_path: Path) -> None:
    model, database, nested, sub = made("llama", tmp_path)
    small = Nested(model, family_of(model.config), database, cache_bytes=1)
    for _ in range(2):
        assert all(torch.equal(value, nested(sub)[key]) for key, value in small(sub).items())
        assert len(small._cache) == 1


@torch.no_grad()
def test_whole_layers_and_smaller_hidden_sizes_are_left_alone(tmp_path: Path) -> None:
    model, _, nested, _ = made("llama", tmp_path)
    whole = full(model.config)
    assert nested(whole) == {}
    gone = SubNetwork(whole.hidden, (whole.layers[0], LayerShape(0, 0, 0), *whole.layers[2:]))
    assert nested(gone) == {}
    assert nested(ragged(model.config, hidden=True)) == {}
