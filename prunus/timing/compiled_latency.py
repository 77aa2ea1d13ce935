"""Floor 3: how long every width takes under `torch.compile`: a table for `timetable.py`, fitted to whole networks.

Compiled code has no layers left to time, so a dozen networks are compiled and timed in turns (`whole_networks.py`).
What is timed is what transformers' `generate` does with a static cache: the prompt as it is, all further tokens
compiled.
Times do not depend on the values of weights, so all networks borrow the model's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import StaticCache
from transformers.generation.configuration_utils import CompileConfig

from prunus.errors import UserError
from prunus.models.families import Family, dims
from prunus.models.slicing import extract
from prunus.progress import Progress, silent
from prunus.subnetwork import SubNetwork
from prunus.texts.sampling import check_length
from prunus.timing import latency, whole_networks
from prunus.timing.latency import ROUNDS, Laps, Runner, prompt_of, warn_if_busy
from prunus.timing.timetable import Grid, Request, Timetable, grid_of, recall, remember
from prunus.timing.whole_networks import Array, Plan, fitted

RUNTIME = "torch.compile"


class CompiledRunner(Runner):
    """A model as `generate(cache_implementation="static")` runs it."""

    def __init__(self, model: Any, request: Request) -> None:
        super().__init__(model)
        self.static: Any = StaticCache(config=model.config, max_cache_len=request.prompt + max(1, request.generate))
        options = CompileConfig().to_dict() | {"dynamic": False}  # each for its own shapes, as in a process of its own
        if next(model.parameters()).device.type == "cpu":
            options.pop("mode", None)  # graphs of CUDA mean nothing here
        self.step = torch.compile(model, **options)

    def cache(self) -> Any:
        """The same one in every request, emptied."""
        self.static.reset()
        return self.static


def measure(
    model: Any,
    family: Family,
    request: Request,
    *,
    step: int | None = None,
    rounds: int = ROUNDS,
    again: bool = False,
    progress: Progress = silent,
) -> Timetable:
    """The table of a model with compiled steps on its device, from the cache where it was measured before.

    Raises UserError where nothing can be compiled here, and where the request exceeds the model's positions.
    """
    check_length(model, request.prompt + max(1, request.generate))
    grid = grid_of(dims(model.config), step)
    key = key_of(model, family, request, grid)
    if not again and (known := recall(key)) is not None:
        return known
    check_compiles(next(model.parameters()).device)
    planned = plan_of(model, family, grid)
    prefill, decode = time_networks(model, family, planned.networks, request, rounds=rounds, progress=progress)
    table = fitted(key, request, grid, planned, prefill, decode)
    remember(table)
    warn_if_busy(table)
    return table


def key_of(model: Any, family: Family, request: Request, grid: Grid) -> dict[str, Any]:
    """Everything that the times depend on: as without compiling."""
    return latency.key_of(model, family, request, grid) | {"runtime": RUNTIME}


def plan_of(model: Any, family: Family, grid: Grid) -> Plan:
    """What is timed: everything can be compiled."""
    return whole_networks.plan_of(model, family, grid, lambda _: True, attention_free=True, stub=0)


@cache
def check_compiles(device: torch.device) -> None:
    """Raise UserError where this machine cannot compile: a C++ compiler is needed for CPUs, Triton for GPUs."""
    try:
        with _room():
            torch.compile(lambda x: torch.relu(x) + 1)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, the loader, the driver: torch has no common class for them
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"torch.compile does not work on this machine for {device.type}: {first}; install what it needs (a C++ "
            "compiler for CPUs, Triton for GPUs), or leave --runtime out"
        ) from error


def time_networks(
    model: Any, family: Family, networks: Sequence[SubNetwork], request: Request, *,
    rounds: int = ROUNDS, progress: Progress = silent,
) -> tuple[Array, Array]:  # fmt: skip
    """Milliseconds of the prompt and of one compiled step, each (rounds, networks), in turns."""
    small = [borrowing(extract(model, family, sub), model) for sub in networks]
    laps = _timed(small, request, rounds, progress)
    prefill, decode = ([[lap.total for lap in own.of(phase)] for own in laps] for phase in ("prefill", "decode"))
    return np.array(prefill).T, np.array(decode).T


def borrowing(small: nn.Module, model: nn.Module) -> nn.Module:
    """A network whose matrices are the first numbers of the model's own, whatever they mean: it costs no memory."""
    for name, parameter in small.named_parameters():
        lender = model.get_parameter(name)
        if lender.is_contiguous() and lender.dtype == parameter.dtype:
            parameter.data = lender.data.flatten()[: parameter.numel()].view(parameter.shape)
    return small


def compare(dense: nn.Module, small: nn.Module, request: Request) -> dict[str, float]:
    """As `latency.compare`, with compiled steps."""
    first, second = _timed([dense, small], request, ROUNDS, silent)
    return latency.compared(first, second, request)


def _timed(models: Sequence[Any], request: Request, rounds: int, progress: Progress) -> list[Laps]:
    runners = [CompiledRunner(model, request) for model in models]
    with _room(), torch.inference_mode():
        with progress("compiling whole networks", len(runners)) as advance:
            for runner in runners:
                _compile(runner, request)
                advance(1)
        with progress("time of whole networks", rounds + 1) as advance:
            return latency.time_models(models, request, rounds=rounds, runners=runners, advance=advance)


def _compile(runner: CompiledRunner, request: Request) -> None:
    """A prompt, which gives the cache its tensors, and the first steps."""
    out = runner.model(input_ids=prompt_of(runner.model, request), past_key_values=runner.cache(), logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    for _ in range(min(2, max(1, request.generate))):
        runner.step(input_ids=token, past_key_values=runner.static, use_cache=True, logits_to_keep=1)


@contextmanager
def _room() -> Iterator[None]:
    """Room for as many compiled networks as there are; too few of them would run uncompiled without a word."""
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(
            recompile_limit=10_000, accumulated_recompile_limit=10_000, fail_on_recompile_limit_hit=True
        ):
            yield
    finally:
        torch._dynamo.reset()
