"""Floor 1: every parameter of a model with the meaning of its axes; `check` that none is left over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunus.errors import UserError
from prunus.models.families import UNCUT, Family, Part, dims, size_of


@dataclass(frozen=True)
class Row:
    """One parameter of the super-network: where it is, and what its axes mean."""

    path: str  # as in state_dict, e.g. "model.layers.3.mlp.up_proj.weight"
    module: nn.Module
    name: str
    parameter: nn.Parameter
    axes: tuple[str, ...]  # in storage order
    layer: int | None
    part: Part


def rows(model: nn.Module, family: Family) -> Iterator[Row]:
    """Every parameter that the family table names, adapters of peft's LoRA included."""
    for path, pattern in family.outer.items():
        yield from _module_rows(model, path, pattern, None, "outer")
    parts: tuple[tuple[Part, Mapping[str, str]], ...] = (
        ("block", family.block),
        ("attention", family.attention),
        ("mlp", family.mlp),
    )
    for i, layer in enumerate(layers_of(model, family)):
        for part, table in parts:
            for path, pattern in table.items():
                yield from _module_rows(layer, path, pattern, i, part, f"{family.layers}.{i}.")


def layers_of(model: nn.Module, family: Family) -> nn.ModuleList:
    """The decoder layers."""
    found = model.get_submodule(family.layers)
    assert isinstance(found, nn.ModuleList)
    return found


def _module_rows(
    root: nn.Module, path: str, pattern: str, layer: int | None, part: Part, prefix: str = ""
) -> Iterator[Row]:
    module = _find(root, path)
    if module is None:
        return
    first, _, second = (side.strip() for side in pattern.partition("->"))
    out = second or first
    axes: tuple[str, ...]
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):  # a LoRA layer: A reads the input axis, B writes the output axis
        for key, a in dict(module.lora_A).items():  # type: ignore[arg-type]
            b = dict(module.lora_B)[key]  # type: ignore[arg-type]
            yield Row(f"{prefix}{path}.lora_A.{key}.weight", a, "weight", a.weight, (UNCUT, first), layer, part)
            yield Row(f"{prefix}{path}.lora_B.{key}.weight", b, "weight", b.weight, (out, UNCUT), layer, part)
        for name, axes in (("lora_embedding_A", (UNCUT, first)), ("lora_embedding_B", (out, UNCUT))):
            holder = getattr(module, name, None)
            for key in dict(holder) if holder is not None else ():
                yield Row(f"{prefix}{path}.{name}.{key}", holder, key, holder[key], axes, layer, part)  # type: ignore
        path, module = f"{path}.base_layer", base
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 1:
            axes = (out,)
        else:  # Linear stores (out, in); Embedding and GPT-2's Conv1D store (in, out)
            axes = (first, out) if isinstance(module, nn.Embedding | Conv1D) else (out, first)
        yield Row(f"{prefix}{path}.{name}", module, name, parameter, axes, layer, part)


def _find(root: nn.Module, path: str) -> nn.Module | None:
    try:
        found = root.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def check(model: nn.Module, family: Family) -> None:
    """Every parameter is in the family table, at the size that the config promises.

    Raises UserError naming the first parameter that the table misses, has at another size, or that is not finite.
    """
    d, seen = dims(model.config), set()
    for row in rows(model, family):
        want = tuple(n if a == UNCUT else size_of(a, d) for a, n in zip(row.axes, row.parameter.shape, strict=True))
        if tuple(row.parameter.shape) != want:
            raise UserError(
                f"{row.path} has shape {tuple(row.parameter.shape)}, but the {family.name} table and the config "
                f"promise {' x '.join(row.axes)} = {want}; the checkpoint and its config.json do not belong together, "
                "or the model needs a family table of its own"
            )
        seen.add(id(row.parameter))
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in seen]
    if left:
        raise UserError(
            f"the {family.name} table has no row for {left[0]!r} ({len(left)} parameters are not covered); "
            "add the missing rows in prunus/models/families.py"
        )
    check_finite(model)


def check_finite(model: nn.Module) -> None:
    """Raises UserError naming the first parameter that holds NaN or an infinite value."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter.sum(dtype=torch.float32))):
            raise UserError(
                f"{name} holds NaN or infinite values; the checkpoint is damaged, fetch or convert it again"
            )
