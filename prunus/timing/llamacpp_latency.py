"""Floor 3: how long every width takes in llama.cpp: a table for `timetable.py`, fitted to whole networks.

llama.cpp does not tell how long a single layer takes, so a dozen networks of the model are written as GGUF files, with
all layers alike but for one that lacks attentions and one that is only half as deep, and timed in turns. A network
takes

    outside + sum over layers of [ a + b kv_heads + c kv_heads q_per_kv + M(mlp) ],

where M is linear between a handful of widths; the unknowns are the non-negative least-squares solution for relative
errors. A further network, with other widths, is left out of the fit and checks it.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunus.errors import UserError
from prunus.exporting import llamacpp
from prunus.exporting.architectures import Architecture, carrier, shapes_of
from prunus.exporting.gguf_file import describe, write
from prunus.exporting.gguf_tensors import STUB, n_bytes, plan
from prunus.machine import words
from prunus.models.checkpoint import blank
from prunus.models.families import Family, dims, full
from prunus.models.slicing import extract, layers_of
from prunus.progress import Progress, silent
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.texts.sampling import check_length
from prunus.timing.latency import ROUNDS, unrest, warn_if_busy
from prunus.timing.latency import key_of as torch_key_of
from prunus.timing.timetable import (
    Grid,
    Phase,
    Request,
    Times,
    Timetable,
    grid_of,
    recall,
    remember,
    rising,
    rising_table,
)

KNOTS = 6  # widths of the MLP that are timed; lines in between
EMPTY = LayerShape(0, 0, 0)
BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}  # of one number of a matrix
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Plan:
    """What is timed, and what the fit may tell apart."""

    networks: tuple[SubNetwork, ...]  # the dense one first; the last one is not fitted
    knots: tuple[int, ...]
    attention_alone: bool  # some network lacks attentions, so that they can be told from the MLPs
    attention_free: bool  # a layer without attention has none in the file either, and not one head of zeros


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
    """Networks whose times tell what every width takes, and one more that checks the answer.

    Networks that llama.cpp has no architecture for (layers that differ, fewer heads) are left out.
    """
    whole, n = full(model.config), len(layers_of(model, family))
    if n < 2:
        raise UserError("a table of latencies needs a model of two layers or more; this one has one")
    carrier_of(model)
    dense = whole.layers[0]
    knots = _few(grid.mlp, KNOTS)
    middle = knots[len(knots) // 2]
    kv, q = dense.kv_heads, dense.q_per_kv
    heads = dict.fromkeys([(kv, 1), (1, q), (1, 1), ((kv + 1) // 2, q), ((kv + 1) // 2, (q + 1) // 2)])
    shapes: list[tuple[LayerShape, ...]] = [(dense,) * n, (dense,) * (n // 2) + (EMPTY,) * (n - n // 2)]
    shapes += [(LayerShape(kv, q, width),) * n for width in knots[:-1]]
    shapes += [(LayerShape(*own, middle),) * n for own in heads if own != (kv, q)]
    free = (dense, *(LayerShape(0, 0, dense.mlp),) * (n - 1))
    rng = random.Random(0)
    mixed = tuple(
        LayerShape(rng.choice(grid.kv_heads), rng.choice(grid.q_per_kv), rng.choice(grid.mlp)) for _ in range(n)
    )
    between = (LayerShape(kv, q, (knots[-1] + knots[-2]) // 2 // 32 * 32 or knots[-1]),) * (n - 1)
    possible = [SubNetwork(whole.hidden, own) for own in (*shapes, free)]
    networks = [sub for sub in possible if architecture(model, family, sub) is not None]
    found = architecture(model, family, possible[-1])
    left_out = next(
        sub
        for sub in (SubNetwork(whole.hidden, mixed), SubNetwork(whole.hidden, (*between, EMPTY)))
        if architecture(model, family, sub) is not None
    )
    free_of_it = found is not None and found.attention_free
    return Plan((*networks, left_out), knots, free_of_it, found is None or found.attention_free)


def architecture(model: Any, family: Family, sub: SubNetwork) -> Architecture | None:
    """What llama.cpp would hold a sub-network in, or None."""
    with torch.device("meta"):
        small: Any = blank(model.config, family, sub, uniform=None, dtype=torch.float32)
    try:
        return carrier(small.config, _tied(model))
    except UserError:
        return None


def _few(widths: Sequence[int], n: int) -> tuple[int, ...]:
    """At most n of some ascending numbers, the ends among them."""
    if len(widths) <= n:
        return tuple(widths)
    return tuple(sorted({widths[round(k * (len(widths) - 1) / (n - 1))] for k in range(n)}))


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
        models = [partial(extract, model, family, sub) for sub in networks]
        paths = write_files(models, quant, Path(directory), progress)
        with progress("time of whole networks in llama.cpp"):
            try:
                return llamacpp.timed(paths, request, rounds=rounds, threads=torch.get_num_threads())
            except llamacpp.LlamaCppError as error:
                raise UserError(f"llama.cpp cannot run networks of this model: {error}") from error


def compare(dense: Any, small: Any, request: Request, quant: str) -> dict[str, float]:
    """As `latency.compare`, in llama.cpp."""
    with tempfile.TemporaryDirectory(prefix="prunus-") as directory:
        files = write_files([lambda: dense, lambda: small], quant, Path(directory), silent)
        prefill, decode = llamacpp.timed(files, request, rounds=ROUNDS, threads=torch.get_num_threads())
    total = prefill + request.generate * decode
    return {
        "prefill_ms": float(np.median(prefill[:, 1])),
        "token_ms": float(np.median(decode[:, 1])),
        "request_ms": float(np.median(total[:, 1])),
        "dense_request_ms": float(np.median(total[:, 0])),
        "speedup": float(np.median(total[:, 0] / total[:, 1])),
    }


# ------------------------------------------------------------------------------------------------------------ the fit


def features(sub: SubNetwork, planned: Plan) -> Array:
    """What the time of a network is linear in: 1, layers that attend, KV heads, heads, and the knots of its MLPs."""
    row = np.zeros(4 + len(planned.knots))
    row[0] = 1
    for i in sub.alive:
        shape = sub.layers[i]
        kv, q = (shape.kv_heads, shape.q_per_kv) if shape.attends else (0, 0)
        if not kv and not planned.attention_free:
            kv = q = 1
        row[1:4] += (kv > 0, kv, kv * q)
        row[4:] += _hats(planned.knots, shape.mlp or STUB)
    if not planned.attention_alone:
        row[1] = 0  # a constant of each layer: the knots have it
    return row


def _hats(knots: Sequence[int], width: int) -> Array:
    """Weights of the knots in the line through the two nearest ones."""
    out = np.zeros(len(knots))
    if len(knots) == 1:
        out[0] = 1
        return out
    right = int(np.clip(np.searchsorted(knots, width), 1, len(knots) - 1))
    share = (width - knots[right - 1]) / (knots[right] - knots[right - 1])
    out[right - 1], out[right] = 1 - share, share
    return out


def solve(rows: Array, ms: Array) -> Array:
    """Non-negative unknowns with the least squares of relative errors: what comes out negative is left out in turn."""
    scaled, ones = rows / ms[:, None], np.ones(len(ms))
    used = [int(k) for k in np.flatnonzero(np.abs(rows).sum(0))]
    while True:
        found = np.zeros(rows.shape[1])
        found[used] = np.linalg.lstsq(scaled[:, used], ones, rcond=None)[0]
        if found.min() >= -1e-12:
            return np.maximum(found, 0.0)
        used.remove(int(found.argmin()))


def fitted(
    key: dict[str, Any], request: Request, grid: Grid, planned: Plan, prefill: Array, decode: Array
) -> Timetable:
    """The table from the times (rounds, networks) of both phases, the last network being left out."""
    rows = np.array([features(sub, planned) for sub in planned.networks])
    times: dict[Phase, Times] = {}
    errors, restless = [], []
    phases: tuple[tuple[Phase, Array], ...] = (("prefill", prefill), ("decode", decode))
    for phase, found in phases:
        ms = np.median(found, 0)
        unknowns = solve(rows[:-1], ms[:-1])
        times[phase] = _times(unknowns, grid, planned)
        errors.append(abs(float(rows[-1] @ unknowns) / float(ms[-1]) - 1))
        restless += [unrest(column.tolist()) for column in found.T]
    whole = planned.networks[0]
    spread = statistics.median(restless)
    return Timetable(key, request, whole.hidden, grid, times["prefill"], times["decode"], spread, max(errors))


def _times(unknowns: Array, grid: Grid, planned: Plan) -> Times:
    outside, each, per_group, per_head, *at_knots = unknowns.tolist()

    def attention(kv: int, q: int) -> float:
        return float(each + per_group * kv + per_head * kv * q)

    def mlp(width: int) -> float:
        return max(0.0, float(_hats(planned.knots, width) @ np.array(at_knots)))

    without = 0.0 if planned.attention_free else attention(1, 1)  # what stands where an attention was
    stub = mlp(STUB)
    heads = [[attention(kv, q) + stub for q in grid.q_per_kv] for kv in grid.kv_heads]
    widths = rising([mlp(width) + without for width in grid.mlp])
    return Times(float(outside), stub + without, rising_table(heads), tuple(widths))
