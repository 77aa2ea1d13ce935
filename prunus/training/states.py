"""Floor 2: the states of a training on disk: what is trained, whose they are, and which of them was written whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from prunus.errors import UserError
from prunus.recording.artefact import write_text
from prunus.texts.calibration import token_hash
from prunus.texts.instructions import Windows

WEIGHTS = "trainable.safetensors"
SPENT = "seconds.txt"  # what it took to come there
WHOLE = "trainer_state.json"  # Trainer writes it last
RECORD = "training.json"  # what the states belong to
EASED = ("lr", "warmup", "precision")  # settings that a training may go on with: what helps against a loss of NaN


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


def refuse_sharded(state: Any, *, slices: bool) -> None:
    """Raise UserError for ways of sharding that cannot serve; slices: sub-networks are trained.

    state: accelerate's, which knows what the launcher asked for.
    """
    fsdp, zero = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if zero is not None and zero.zero_stage > 2:
        raise UserError("DeepSpeed's stage 3 leaves no process a whole weight; give zero_stage 1 or 2, or FSDP 2")
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise UserError("of FSDP only version 2 is served; give fsdp_version: 2 in accelerate's configuration")
    if fsdp is not None and slices:
        raise UserError(
            "sub-networks are views into whole weights, which FSDP shards; train a super-network by torchrun alone, or "
            "with DeepSpeed's stages 1 and 2"
        )


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


def step_of(state: Path) -> int:
    """The step after which a state was written."""
    return int(state.name.rpartition("-")[2])


def last(folder: Path) -> Path | None:
    """The newest state that was written whole."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            json.loads((path / WHOLE).read_text())
        except (OSError, ValueError):
            continue
        return path
    return None


def digest(windows: Windows) -> str:
    """A short name of the windows that a training reads."""
    return token_hash(torch.cat([windows.ids, windows.labels]))[:16]


def differing(folder: Path, note: Mapping[str, Any]) -> list[str]:
    """The keys in which the states of a folder belong to another training than this one; none where it has no states.

    note: what makes a training this one, as plain data.
    """
    if not last(folder) or not (folder / RECORD).exists():
        return []
    theirs = json.loads((folder / RECORD).read_text())
    return sorted(key for key in {*theirs, *note} - {"eased"} if theirs.get(key) != note.get(key))


def refuse_processes(folder: Path, processes: int) -> None:
    """Raise UserError where a folder holds states that another number of processes left: they would be of no use."""
    state = last(folder)
    if state is None or not (folder / RECORD).exists():
        return
    theirs = json.loads((folder / RECORD).read_text()).get("processes", processes)
    if theirs != processes:
        raise UserError(
            f"{str(folder)!r} holds a training of {theirs} processes, stopped after step {step_of(state)}, and these "
            f"are {processes}: start as many, or delete that folder, and the training begins again"
        )


def refuse_full_disk(folder: Path, n_trained: int) -> None:
    """Raise UserError where the disk cannot take the states of a training: the parameters that are trained and Adam's
    two moments of each, in float32, in three states at most (two that are kept, and one that is written)."""
    each = 12 * n_trained
    there = len([*folder.glob("checkpoint-*")]) if folder.is_dir() else 0
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if (need := each * max(1, 3 - there)) > free:
        raise UserError(
            f"the states of this training need {need / 1e6:,.1f} MB, but the disk of {str(folder)!r} has "
            f"{free / 1e6:,.1f} MB left; make room, give --rank, or choose another --out"
        )


def remember(folder: Path, note: Mapping[str, Any], *, done: bool, write: bool) -> Sequence[Mapping[str, Any]]:
    """Note what the states of this folder belong to (`write`: in one of the processes); refuse to go on with others.

    done: nothing is left to train, so that no setting may differ.
    Returns the settings that were eased on the way, this time's included: the step, and (before, after) of each.
    """
    state, differs, eased = last(folder), differing(folder, note), []
    if state and (folder / RECORD).exists():
        theirs = json.loads((folder / RECORD).read_text())
        if {*differs} - {*(() if done else EASED)}:
            named = ", ".join(f"{key} ({theirs.get(key)}, now {note.get(key)})" for key in differs)
            raise UserError(
                f"{str(folder)!r} holds a training with other settings: {named}. Give those again, or delete it"
            )
        eased = list(theirs.get("eased", ()))
        if differs:
            eased.append({"step": step_of(state), **{key: [theirs.get(key), note.get(key)] for key in differs}})
    folder.mkdir(parents=True, exist_ok=True)
    if write:
        write_text(folder / RECORD, json.dumps({**note, **({"eased": eased} if eased else {})}, indent=1))
    return eased
