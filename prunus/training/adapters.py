"""Floor 2: LoRA by peft, on the matrices that the family table names; merged without changing any sub-network.

`rows` knows the axes of both factors, so activating, sorting and extracting cut them with the weight that they adapt:
W' = W[o, i] + scale B[o, :] A[:, i] (Hu et al. 2022, arXiv:2106.09685; elastic: Munoz et al. 2024, LoNAS).
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch
from torch import nn

from prunus.errors import UserError
from prunus.models.families import Family
from prunus.models.rows import layers_of
from prunus.training.learning import adapted as parts_of


def attach(
    model: Any,
    family: Family,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    adapted: str = "linear",
    seed: int = 0,
) -> Any:
    """Put LoRA adapters into the model (**in place**) and freeze everything else; returns the model.

    alpha: B A is scaled by alpha / rank; twice the rank by default. adapted: one or several of "attention", "mlp" (the
    matrices of that kind in all decoder layers), "embedding" (of tokens) and "head" (the output matrix); "linear" is
    short for the first two, "all" for all. seed: of their first weights; other random numbers are left as they are.
    Raises UserError where peft is missing, and for "embedding" and "head" where these are one tensor: an update of one
    of them could not be merged without changing the other.
    """
    paths = check(model, family, adapted)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or 2 * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules="|".join(re.escape(path) for path in paths),  # matched as a whole: a list also by path endings
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:  # master weights of what is trained; the frozen ones stay as they are
            parameter.data = parameter.data.float()
    return model


def check(model: Any, family: Family, adapted: str) -> list[str]:
    """The paths of the matrices that would get adapters; raises UserError as `attach` does."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("LoRA needs the package peft; install it with pip install 'prunus[train]'")
    parts = parts_of(adapted)
    if {"embedding", "head"} & {*parts} and getattr(model.config, "tie_word_embeddings", False):
        raise UserError(
            f"adapters on embedding or output matrix (--adapt {adapted}) need two matrices, but this model has one for "
            "both; use --adapt linear, or --rank 0 to train all weights"
        )
    inner = {**(family.attention if "attention" in parts else {}), **(family.mlp if "mlp" in parts else {})}
    found = [
        f"{family.layers}.{i}.{path}"
        for i in range(len(layers_of(model, family)))
        for path, row in inner.items()
        if "->" in row
    ]
    ends = {"vocab -> hidden": "embedding", "hidden -> vocab": "head"}
    there = {path for path, _ in model.named_modules()}
    return found + [path for path, row in family.outer.items() if ends.get(row) in parts and path in there]


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that carry adapters, by path."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")}


def merge(model: nn.Module) -> nn.Module:
    """Add every update to its weight and take the adapters out (**in place**); returns the model.

    The sum is taken in float32 and rounded once to the weight's own type. A law: every sub-network computes as before.
    """
    for path, module in adapted_modules(model).items():
        base = module.get_base_layer()
        weight = base.weight
        delta = sum(module.get_delta_weight(name) for name in module.active_adapters)
        with torch.no_grad():
            weight.data = (weight.data.float() + delta.float().to(weight.device)).to(weight.dtype)
        model.set_submodule(path, base)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


__all__ = ["adapted_modules", "attach", "check", "merge"]
