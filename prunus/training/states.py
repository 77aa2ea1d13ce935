"""Floor 2: the states of a training on disk: what is trained, how long it took, and which of them was written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from prunus.errors import UserError

WEIGHTS = "trainable.safetensors"
SPENT = "seconds.txt"  # what it took to come there
WHOLE = "trainer_state.json"  # Trainer writes it last


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What gets gradients, by name; tied weights once. Of a sharded model (FSDP2) every process gets all of it, and
    every process has to ask."""
    own = own_parameters(model).items()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).contiguous() for name, p in own}


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The same as it lies in this process: of a sharded model a part."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def is_sharded(model: nn.Module) -> bool:
    """True if processes share the weights of a model among them."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model what `trained` took from one like it (**in place**)."""
    own = own_parameters(model)
    for name, tensor in weights.items():
        target = own[name]
        if isinstance(target, DTensor):
            tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
        target.copy_(tensor)


def save(weights: dict[str, Tensor], state: Path, seconds: float) -> None:
    """Only what is trained: adapters, or all weights in their master precision."""
    state.mkdir(parents=True, exist_ok=True)
    save_file(weights, state / WEIGHTS)
    (state / SPENT).write_text(f"{seconds}")


def load(model: nn.Module, state: Path) -> float:
    """Put what a state holds into the model (**in place**), and return its seconds; UserError for another model's."""
    own, found = own_parameters(model), load_file(state / WEIGHTS)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in found.items()}:
        raise UserError(
            f"{str(state)!r} was trained with other adapters or another model; delete it, or give the settings "
            "that it was started with"
        )
    put(model, found)
    return float((state / SPENT).read_text())


def last(folder: Path) -> Path | None:
    """The newest state that was written whole."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / WHOLE).read_text())
        except (OSError, ValueError):
            continue
        return path
    return None
