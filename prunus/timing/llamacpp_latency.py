"""Floor 3: how long every width takes in llama.cpp: a table for `timetable.py`, fitted to whole networks.

llama.cpp does not tell how long a single layer takes, so a dozen networks of the model are written as GGUF files, and
timed in turns (`whole_networks.py`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunus.errors import UserError
from prunus.exporting import llamacpp
from prunus.exporting.architectures import Architecture, carrier, shapes_of
from prunus.exporting.gguf_file import describe, write
from prunus.exporting.gguf_tensors import STUB, n_bytes, plan
from prunus.machine import words
from prunus.models.checkpoint import blank
from prunus.models.families import Family, dims, full
from prunus.models.memory import available
from prunus.models.slicing import extract, layers_of
from prunus.progress import Progress, silent
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.texts.sampling import check_length
from prunus.timing import whole_networks
from prunus.timing.latency import ROUNDS, compared, warn_if_busy
from prunus.timing.latency import key_of as torch_key_of
from prunus.timing.timetable import Grid, Request, Timetable, grid_of, recall, remember
from prunus.timing.whole_networks import Array, Plan, fitted, laps_of

BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}  # of one number of a matrix


def check_installed() -> str:
    """The version of llama-cpp-python; UserError where it is missing."""
    known = llamacpp.installed()
    if known is None:
        raise UserError(
            "timing in llama.cpp needs llama-cpp-python: pip install 'prunus[llama-cpp]' (it compiles for minutes), or "
            "leave --runtime out"
        )
    return known


def measure(
    model: Any,
    family: Family,
    request: Request,
    *,
    quant: str = "f16",
    step: int | None = None,
    rounds: int = ROUNDS,
    again: bool = False,
    progress: Progress = silent,
) -> Timetable:
    """The table of a model in llama.cpp on this machine's CPU, from the cache where it was measured before.

    quant: type of the matrices in the files: f32, f16, q8_0 or q4_0.
    Raises UserError where llama-cpp-python is missing, llama.cpp has no architecture for the model, the request exceeds
    the model's positions, or the files the disk.
    """
    check_installed()
    check_length(model, request.prompt + max(1, request.generate))
    grid = grid_of(dims(model.config), step)
    key = key_of(model, family, request, grid, quant)
    if not again and (known := recall(key)) is not None:
        return known
    planned = plan_of(model, family, grid)
    prefill, decode = time_networks(model, family, planned.networks, request, quant, rounds=rounds, progress=progress)
    table = fitted(key, request, grid, planned, prefill, decode)
    remember(table)
    warn_if_busy(table)
    return table


def key_of(model: Any, family: Family, request: Request, grid: Grid, quant: str) -> dict[str, Any]:
    """Everything that the times depend on: as in PyTorch, but for what is llama.cpp's."""
    own = torch_key_of(model, family, request, grid)
    versions = {"python": own["versions"].get("python", ""), llamacpp.PACKAGE: check_installed()}
    return own | {
        "runtime": "llama.cpp",
        "device": f"cpu, {words()}",
        "threads": torch.get_num_threads(),
        "dtype": quant,
        "attention": "llama.cpp",
        "versions": versions,
    }


# ------------------------------------------------------------------------------------------------------ what is timed


def carrier_of(model: Any) -> Architecture:
    """llama.cpp's architecture of a model; UserError where it has none."""
    return carrier(model.config, _tied(model))


def _tied(model: Any) -> bool:
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def plan_of(model: Any, family: Family, grid: Grid) -> Plan:
    """What is timed; networks that llama.cpp has no architecture for (layers that differ, fewer heads) are left out."""
    carrier_of(model)
    whole, n = full(model.config), len(layers_of(model, family))
    dense = whole.layers[0]
    found = architecture(model, family, SubNetwork(whole.hidden, (dense, *(LayerShape(0, 0, dense.mlp),) * (n - 1))))
    return whole_networks.plan_of(
        model, family, grid, lambda sub: architecture(model, family, sub) is not None,
        attention_free=found is None or found.attention_free, stub=STUB,
    )  # fmt: skip


def architecture(model: Any, family: Family, sub: SubNetwork) -> Architecture | None:
    """What llama.cpp would hold a sub-network in, or None."""
    with torch.device("meta"):
        small: Any = blank(model.config, family, sub, uniform=None, dtype=torch.float32)
    try:
        return carrier(small.config, _tied(model))
    except UserError:
        return None


def write_files(models: Sequence[Callable[[], Any]], quant: str, directory: Path, progress: Progress) -> list[Path]:
    """A GGUF file of every model, made one at a time, without a vocabulary; UserError where the disk is too small."""
    paths = []
    with progress("files for llama.cpp", len(models)) as advance:
        for i, make in enumerate(models):
            small = make()
            one, shapes = carrier(small.config, _tied(small)), shapes_of(small.config)
            planned = plan(small, one, shapes, quant)
            need, free = sum(map(n_bytes, planned)) * (len(models) - i), shutil.disk_usage(directory).free
            if need > free:
                raise UserError(
                    f"timing in llama.cpp writes {len(models)} files: {need / 1e9:.1f} GB more in {str(directory)!r}, "
                    f"where {free / 1e9:.1f} GB are free; make room, or set TMPDIR to another disk"
                )
            path = directory / f"{i}.gguf"

            def fill(writer: Any, config: Any = small.config, one: Any = one, shapes: Any = shapes) -> None:
                describe(writer, config, one, shapes)
                writer.add_tokenizer_model("no_vocab")

            write(path, path.stem, one, planned, quant, fill)
            paths.append(path)
            advance(1)
    return paths


def time_networks(
    model: Any, family: Family, networks: Sequence[SubNetwork], request: Request, quant: str, *,
    rounds: int = ROUNDS, progress: Progress = silent,
) -> tuple[Array, Array]:  # fmt: skip
    """Milliseconds of the prompt and of one decoding step in llama.cpp, each (rounds, networks), in turns."""
    with tempfile.TemporaryDirectory(prefix="prunus-") as directory:
        free = available()  # before the files: a temporary directory may lie in memory
        models = [partial(extract, model, family, sub) for sub in networks]
        paths = write_files(models, quant, Path(directory), progress)
        with progress("time of whole networks in llama.cpp"):
            return _timed(paths, request, rounds, free)


def _timed(paths: Sequence[Path], request: Request, rounds: int, free: int | None) -> tuple[Array, Array]:
    """All files in turns, for which all of them are in memory at once."""
    need = sum(path.stat().st_size for path in paths)
    if free is not None and need > free:
        raise UserError(
            f"timing in llama.cpp holds {len(paths)} networks in memory: {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            "are free; give a smaller --quant, or leave --runtime out"
        )
    try:
        return llamacpp.timed(paths, request, rounds=rounds, threads=torch.get_num_threads())
    except llamacpp.LlamaCppError as error:
        raise UserError(f"llama.cpp cannot run networks of this model: {error}") from error


def compare(dense: Any, small: Any, request: Request, quant: str) -> dict[str, float]:
    """As `latency.compare`, in llama.cpp."""
    with tempfile.TemporaryDirectory(prefix="prunus-") as directory:
        free = available()
        files = write_files([lambda: dense, lambda: small], quant, Path(directory), silent)
        prefill, decode = _timed(files, request, ROUNDS, free)
    first, second = laps_of(prefill, decode)
    return compared(first, second, request)
