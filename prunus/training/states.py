"""Floor 2: the states of a training on disk: what is trained, how long it took, and which of them was written whole."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunus.errors import UserError

WEIGHTS = "trainable.safetensors"
SPENT = "seconds.txt"  # what it took to come there
WHOLE = "trainer_state.json"  # Trainer writes it last


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What gets gradients, by name; tied weights once."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save(model: nn.Module, state: Path, seconds: float) -> None:
    """Only what is trained: adapters, or all weights in their master precision."""
    state.mkdir(parents=True, exist_ok=True)
    save_file(trained(model), state / WEIGHTS)
    (state / SPENT).write_text(f"{seconds}")


def load(model: nn.Module, state: Path) -> float:
    """Put what a state holds into the model (**in place**), and return its seconds; UserError for another model's."""
    own, found = trained(model), load_file(state / WEIGHTS)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in found.items()}:
        raise UserError(
            f"{str(state)!r} was trained with other adapters or another model; delete it, or give the settings "
            "that it was started with"
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
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
