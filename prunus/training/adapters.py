"""Floor 2: LoRA by peft, on the matrices that the family table names; merged without changing any sub-network.

`rows` knows the axes of both factors, so activating, sorting and extracting cut them with the weight that they adapt:
W' = W[o, i] + scale B[o, :] A[:, i] (Hu et al. 2022, arXiv:2106.09685; elastic: Munoz et al. 2024, LoNAS).
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import nn

from prunus.errors import UserError
from prunus.models.families import Family

Adapted = Literal["linear", "attention", "mlp", "all"]


def attach(
    model: Any,
    family: Family,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    adapted: Adapted = "linear",
    seed: int = 0,
) -> Any:
    """Put LoRA adapters into the model (**in place**) and freeze everything else; returns the model.

    alpha: B A is scaled by alpha / rank; twice the rank by default. adapted: "linear" takes every matrix of the decoder
    layers, "attention" or "mlp" those of one kind, "all" adds token embedding and output matrix. seed: of their first
    weights; other random numbers are left as they are.
    Raises UserError where peft is missing, and for "all" where embedding and output matrix are one tensor: an update of
    one of them could not be merged without changing the other.
    """
    names = check(model, family, adapted)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or 2 * rank,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=names,
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


def check(model: Any, family: Family, adapted: Adapted) -> list[str]:
    """The names of the matrices that would get adapters; raises UserError as `attach` does."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("LoRA needs the package peft; install it with pip install 'prunus[train]'")
    return _names(model, family, adapted)


def _names(model: Any, family: Family, adapted: Adapted) -> list[str]:
    rows = {"attention": family.attention, "mlp": family.mlp}.get(adapted)
    if rows is not None:
        return sorted({path.rpartition(".")[2] for path, row in rows.items() if "->" in row})
    names = list(family.linear_names)
    if adapted == "all":
        if getattr(model.config, "tie_word_embeddings", False):
            raise UserError(
                "adapters on embedding and output matrix (--adapt all) need two matrices, but this model has one for "
                "both; use --adapt linear, or --rank 0 to train all weights"
            )
        names += [path.rpartition(".")[2] for path, row in family.outer.items() if "vocab" in row]
    return names


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


__all__ = ["Adapted", "adapted_modules", "attach", "check", "merge"]
