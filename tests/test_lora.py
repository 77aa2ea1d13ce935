"""LoRA on the super-network: slicing and merging commute, and only adapters get gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_slicing import _fingerprint, _logits, _random_order, _relative, every_family
from tiny import indexed, ragged, tiny, tokens
from torch import nn

from prunus.errors import UserError
from prunus.models.families import Family, family_of, full
from prunus.models.rows import rows
from prunus.models.slicing import activate, sort
from prunus.training import adapters
from prunus.training.learning import TrainConfig, adapted


def _lora(model: Any, family: Family, embeddings: bool = False) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    targets = [*family.linear_names, *([family.embedding.rpartition(".")[2]] if embeddings else [])]
    torch.manual_seed(7)
    config = LoraConfig(r=3, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    return inject_adapter_in_model(config, model).eval()


def _merge(model: Any) -> Any:
    merged = copy.deepcopy(model)
    for path, module in list(merged.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            merged.set_submodule(path, module.base_layer)
    return merged


@every_family
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("exact")
def test_slicing_and_merging_adapters_commute(name: str, embeddings: bool) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    family = family_of(model.config)
    if embeddings:  # merging an adapter into a tied embedding would change the output matrix too
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    lora: Any = _lora(model, family, embeddings).double()
    merged = _merge(lora)
    for sub in (full(model.config), ragged(model.config), indexed(model.config)):
        with activate(lora, family, sub):
            split = _logits(lora)
        with activate(merged, family, sub):
            assert _relative(split, _logits(merged)) < 1e-5
    order = _random_order(model.config)
    before = _logits(lora)
    sort(lora, family, order)
    assert _relative(_logits(lora), before) < 1e-9


@every_family
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_only_adapters_get_gradients(name: str, embeddings: bool) -> None:
    lora: Any = _lora(tiny(name), family_of(tiny(name).config), embeddings)
    family, sub = family_of(lora.config), ragged(lora.config)
    before = _fingerprint(lora)
    with activate(lora, family, sub):
        model_loss = lora(tokens(), use_cache=False, labels=tokens()).loss
        model_loss.backward()
    with_grad = {n for n, p in lora.named_parameters() if p.grad is not None}
    assert with_grad and all("lora_" in n for n in with_grad)
    assert embeddings == any("lora_embedding" in n for n in with_grad)
    for layer in range(4):
        assert any(f"{family.layers}.{layer}." in n for n in with_grad)
    assert _fingerprint(lora) == before


@every_family
@pytest.mark.parametrize("choice", ["attention", "mlp", "linear", "attention mlp", "embedding", "head", "all"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_sit_on_the_matrices_that_are_named_and_no_others(name: str, choice: str) -> None:
    """GPT-2 calls a matrix of both sub-layers c_proj; paths tell them apart."""
    model: Any = tiny(name)
    family = family_of(model.config)
    if model.config.tie_word_embeddings and choice in ("embedding", "head", "all"):
        with pytest.raises(UserError, match="one for both"):
            adapters.attach(model, family, rank=2, adapted=choice)
        return
    parts = {"linear": "attention mlp", "all": "attention mlp embedding head"}.get(choice, choice).split()
    wanted = {
        row.path.rpartition(".")[0]
        for row in rows(model, family)
        if row.name == "weight" and len(row.axes) == 2 and not {"positions"} & {*row.axes}
        and (row.part if row.part != "outer" else "embedding" if row.path.startswith(family.embedding) else "head")
        in parts
    }  # fmt: skip
    adapters.attach(model, family, rank=2, adapted=choice)
    assert set(adapters.adapted_modules(model)) == wanted
    assert wanted


def test_what_gets_adapters_is_named_by_its_parts() -> None:
    assert adapted("head, attention") == ("attention", "head")
    assert adapted("linear") == adapted("mlp attention") == ("attention", "mlp")
    assert adapted("linear,embedding,head") == adapted("all")
    for wrong in ("lm_head", ",", "attention,mpl"):
        with pytest.raises(UserError, match="one or several of attention, mlp, embedding, head"):
            TrainConfig(adapt=wrong)
