"""Floor 3: how long every width takes on this device: a table for `timetable.py`, measured on real modules.

The super-network is cut into a few probes: ordinary extracted models in which every layer has another shape, so that
one forward with a clock at each layer's door times them all, in the company in which they will work: weights come from
memory and not from a cache that a repeated layer would sit in. Probes and the dense model take turns, round by round,
and medians are kept, so that other load on the machine falls on all widths alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunus.errors import UserError
from prunus.machine import environment, words
from prunus.models import costs
from prunus.models.families import Family, dims, full
from prunus.models.memory import available
from prunus.models.slicing import drop, extract, layers_of
from prunus.progress import Progress, silent
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.texts.sampling import check_length
from prunus.timing.timetable import (
    FORMAT,
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

ROUNDS = 7  # after one that warms up
COPIES = 2  # layers that each width is measured in
TRUST = 0.1  # error for the dense model, or unrest of the machine, above which a table is not to be trusted
EMPTY = LayerShape(0, 0, 0)  # in a probe: a layer that is there and does nothing
UNTIMED = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")  # keys of a configuration

Probe = tuple[LayerShape, ...]
log = logging.getLogger(__name__)


class Clock(Protocol):
    """Marks moments in the work of a device."""

    def mark(self) -> None: ...

    def read(self) -> list[float]:
        """Milliseconds between the marks since the last reading."""
        ...


class WallClock:
    """The clock on the wall; it waits for devices that work on their own."""

    def __init__(self, device: torch.device) -> None:
        self.wait = None if device.type == "cpu" else torch.get_device_module(device).synchronize
        self.marks: list[float] = []

    def mark(self) -> None:
        if self.wait is not None:
            self.wait()
        self.marks.append(1e3 * time.perf_counter())

    def read(self) -> list[float]:
        spans = [b - a for a, b in pairwise(self.marks)]
        self.marks.clear()
        return spans


class EventClock:
    """CUDA's own events: the work goes on between two marks."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.marks.append(event)

    def read(self) -> list[float]:
        torch.cuda.synchronize()
        spans = [float(a.elapsed_time(b)) for a, b in pairwise(self.marks)]
        self.marks.clear()
        return spans


def clock_of(device: torch.device) -> Clock:
    """The best clock for a device."""
    return EventClock() if device.type == "cuda" else WallClock(device)


@dataclass(frozen=True)
class Lap:
    """Milliseconds of one forward: in each layer, outside of them, and what neither accounts for."""

    outside: float
    layers: tuple[float, ...] = ()
    lost: float = 0.0

    @property
    def total(self) -> float:
        return self.outside + sum(self.layers) + self.lost


@dataclass(frozen=True)
class Laps:
    """One model in every round: its prompt, and its decoding step.

    A step's total is the mean of the round's, because interruptions by other programs are rare in a short step and
    still cost the request their share: so prompt and steps add up to the request. Its layers are medians.
    """

    prefill: list[Lap]
    decode: list[Lap]

    def of(self, phase: Phase) -> list[Lap]:
        """All rounds of one phase."""
        return self.prefill if phase == "prefill" else self.decode

    def median(self, phase: Phase) -> float:
        """Milliseconds of one forward."""
        return statistics.median(lap.total for lap in self.of(phase))

    def requests(self, request: Request) -> list[float]:
        """Milliseconds of the whole request in every round."""
        pairs = zip(self.prefill, self.decode, strict=True)
        return [request.ms(prefill.total, step.total) for prefill, step in pairs]


class Runner:
    """A model as a program runs it: here one call after another, with a cache that grows."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.step: Callable[..., Any] = model  # a forward of one token for each sequence

    def cache(self) -> Any:
        """The cache that a request begins with."""
        return None


Timer = Callable[[Sequence[Probe]], list[Laps]]  # of every probe, layer by layer, then of the dense model


# ---------------------------------------------------------------------------------------------------------- the table


def measure(
    model: nn.Module,
    family: Family,
    request: Request,
    *,
    step: int | None = None,
    rounds: int = ROUNDS,
    again: bool = False,
    progress: Progress = silent,
    timer: Timer | None = None,
) -> Timetable:
    """The table of a model on its device, from the cache where it was measured before (unless `again`).

    step: neurons between two widths of the MLP. timer: what times the probes, for tests.
    Raises UserError where the request exceeds the model's positions, or the probes the memory.
    """
    size, n_layers = dims(model.config), len(layers_of(model, family))
    check_length(model, request.prompt + max(1, request.generate))
    if n_layers < 2:
        raise UserError("a table of latencies needs a model of two layers or more; this one has one")
    grid = grid_of(size, step)
    key = key_of(model, family, request, grid)
    if not again and (known := recall(key)) is not None:
        return known
    probes = plan(grid, n_layers)
    if timer is None:
        _refuse_too_large(model, family, probes)
        with progress("time of every width on this device", rounds + 1) as advance:
            built = [build(model, family, probe, grid) for probe in probes]
            doors = [layers_of(one, family) for one in built]
            laps = time_models([*built, model], request, rounds=rounds, doors=doors, advance=advance)
    else:
        laps = timer(probes)
    table = assemble(key, request, full(model.config), grid, probes, laps)
    remember(table)
    warn_if_busy(table)
    return table


def warn_if_busy(table: Timetable) -> None:
    """Say so where a table is not to be trusted."""
    if max(table.check, table.spread) > TRUST:
        log.warning(
            "the machine was busy while its table was measured: whole forwards varied by %.0f %%, and for a network "
            "that it was not made from the table is off by %.0f %%; on a quiet machine, `prunus latency MODEL --again` "
            "makes a better one",
            100 * table.spread,
            100 * table.check,
        )


def key_of(model: Any, family: Family, request: Request, grid: Grid) -> dict[str, Any]:
    """Everything that the times depend on; the values of the weights are not part of it."""
    device = next(model.parameters()).device
    raw = {k: v for k, v in model.config.to_dict().items() if k not in UNTIMED and not k.endswith("token_id")}
    found = environment()
    return {
        "format": FORMAT,
        "runtime": "torch",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {words()}",
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "family": family.name,
        "architecture": hashlib.sha256(json.dumps(raw, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "request": asdict(request),
        "grid": {name: list(widths) for name, widths in asdict(grid).items()},
        "versions": {name: found[name] for name in ("python", "torch", "transformers") if name in found},
    }


def plan(grid: Grid, n_layers: int) -> list[Probe]:
    """Which shape every layer of every probe has: every part of the grid alone, COPIES times, in mixed order.

    Each probe has an empty layer too. Its first layer has both parts and is not used: an attention must stand there,
    and what comes first also waits for what the embedding left behind.
    """
    heads = [(kv, q) for kv in grid.kv_heads for q in grid.q_per_kv]
    alone = [LayerShape(kv, q, 0) for kv, q in heads] + [LayerShape(0, 0, w) for w in grid.mlp]
    alone *= COPIES
    random.Random(0).shuffle(alone)
    n = -(-len(alone) // max(1, n_layers - 2))
    first = LayerShape(*heads[-1], grid.mlp[-1])
    if n_layers == 2:  # no room for an empty layer: it has a probe of its own
        return [(first, shape) for shape in (*alone, EMPTY)]
    return [(first, *alone[p::n], EMPTY) for p in range(n)]


def build(model: Any, family: Family, probe: Probe, grid: Grid) -> nn.Module:
    """One probe as a model, beside the super-network on its device."""
    stand_in = LayerShape(0, 0, grid.mlp[0])
    shapes = [stand_in if shape == EMPTY else shape for shape in probe]
    gone = [EMPTY] * (len(layers_of(model, family)) - len(shapes))
    found = extract(model, family, SubNetwork(dims(model.config)["hidden"], (*shapes, *gone)), uniform=False)
    for layer, shape in zip(layers_of(found, family), probe, strict=True):
        if shape == EMPTY:
            drop(layer, family, attention=False, mlp=True)
            for path, row in family.mlp.items():
                if "->" not in row:
                    layer.set_submodule(path, nn.Identity())
    return found


def _refuse_too_large(model: Any, family: Family, probes: Sequence[Probe]) -> None:
    layout, parameter = costs.layout(model, family), next(model.parameters())
    n, hidden = len(layers_of(model, family)), dims(model.config)["hidden"]
    padded = (SubNetwork(hidden, (*probe, *[EMPTY] * (n - len(probe)))) for probe in probes)
    need = sum(costs.n_bytes(layout, sub, parameter.element_size()) for sub in padded)
    free = available(str(parameter.device))
    if free is not None and need > free:
        raise UserError(
            f"not enough memory on {parameter.device}: {len(probes)} probes that hold every width once need "
            f"{need / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are free; use another --dtype or --device"
        )


def assemble(
    key: dict[str, Any], request: Request, whole: SubNetwork, grid: Grid, probes: Sequence[Probe], laps: Sequence[Laps]
) -> Timetable:
    """The table from what the clock said; the dense model's laps, which come last, only check it.

    On a machine that others use too, the median of a short span knows nothing of the interruptions that every whole
    forward has. So the layers of a phase are scaled to let the probes as a whole take what they took; by 1, where the
    machine is quiet.
    """
    phases: tuple[Phase, ...] = ("prefill", "decode")
    times: dict[str, Times] = {}
    restless: list[float] = []
    for phase in phases:
        all_laps = [one.of(phase) for one in laps[:-1]]
        spans: dict[LayerShape, list[float]] = {}
        for probe, own in zip(probes, all_laps, strict=True):
            for i, shape in enumerate(probe):
                spans.setdefault(shape, []).extend(lap.layers[i] for lap in own)
            restless.append(unrest([lap.total for lap in own]))
        scale = statistics.median(map(_interrupted, all_laps))
        found = {shape: scale * statistics.median(values) for shape, values in spans.items()}
        heads = [[found[LayerShape(kv, q, 0)] for q in grid.q_per_kv] for kv in grid.kv_heads]
        outside = statistics.median(lap.outside for own in all_laps for lap in own)
        widths = rising([found[LayerShape(0, 0, w)] for w in grid.mlp])
        times[phase] = Times(outside, found[EMPTY], rising_table(heads), tuple(widths))
    spread = statistics.median(restless)
    table = Timetable(key, request, whole.hidden, grid, times["prefill"], times["decode"], spread, 0.0)
    return replace(table, check=max(abs(table.ms(whole, phase) / _total(laps[-1].of(phase)) - 1) for phase in phases))


def _total(laps: Sequence[Lap]) -> float:
    return statistics.median(lap.total for lap in laps)


def _interrupted(laps: Sequence[Lap]) -> float:
    """By how much all layers together take longer than the medians of each."""
    inside = zip(*(lap.layers for lap in laps), strict=True)
    medians: float = sum(statistics.median(spans) for spans in inside)
    return (_total(laps) - statistics.median(lap.outside for lap in laps)) / medians


def unrest(values: Sequence[float]) -> float:
    """Half the distance of the quartiles, relative to the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


# ---------------------------------------------------------------------------------------------------------- the clock


@torch.inference_mode()
def time_models(
    models: Sequence[Any],
    request: Request,
    *,
    rounds: int = ROUNDS,
    runners: Sequence[Runner] | None = None,
    doors: Sequence[nn.ModuleList] | None = None,
    clock: Clock | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Laps]:
    """Run a request on every model in turns, prompt by prompt and step by step, `rounds` times after a warm-up.

    runners: how each model is run, if not as it is. doors: the layers of each model, to be timed one by one; without
    them only whole forwards are.
    """
    clock = clock or clock_of(next(models[0].parameters()).device)
    runners = runners or [Runner(model) for model in models]
    found = [Laps([], []) for _ in models]
    hooks = [hook for layers in doors or () for hook in _doors(layers, clock)]
    try:
        for n in range(rounds + 1):
            for laps, prefill, decode in zip(found, *_round(runners, request, clock, n), strict=True):
                if n:
                    laps.prefill.append(prefill)
                    laps.decode.append(decode)
            if advance:
                advance(1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _doors(layers: nn.ModuleList, clock: Clock) -> list[Any]:
    """A mark where every layer begins, and where the last one ends."""

    def ring(*_: Any) -> None:
        clock.mark()

    return [layer.register_forward_pre_hook(ring) for layer in layers] + [layers[-1].register_forward_hook(ring)]


def _round(runners: Sequence[Runner], request: Request, clock: Clock, n: int) -> tuple[list[Lap], list[Lap]]:
    """Every model's prompt and decoding step; steps take turns too, so that all models see the same machine.

    The order is another one in each round: with a fixed one, errors grew from the first model to the last.
    """
    ids, order = prompt_of(runners[0].model, request), random.Random(n).sample(range(len(runners)), len(runners))
    going = {i: _forward(runners[i].model, ids, runners[i].cache(), clock) for i in order}
    prefill = [going[i][2] for i in range(len(runners))]
    steps: list[list[Lap]] = [[] for _ in runners]
    for _ in range(max(1, request.generate)):
        for i in order:
            going[i] = _forward(runners[i].step, *going[i][:2], clock)
            steps[i].append(going[i][2])
    return prefill, [_typical(own) for own in steps]


def prompt_of(model: Any, request: Request) -> Tensor:
    """Random tokens, (batch, prompt), on the model's device."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.config.vocab_size), (request.batch, request.prompt), generator=generator)
    return ids.to(next(model.parameters()).device)


def _forward(forward: Callable[..., Any], ids: Tensor, cache: Any, clock: Clock) -> tuple[Tensor, Any, Lap]:
    """One forward with what chooses the next token: that token, the cache, the time."""
    clock.mark()
    out = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token: Tensor = out.logits[:, -1:].argmax(-1)
    clock.mark()
    spans = clock.read()
    lap = Lap(spans[0]) if len(spans) == 1 else Lap(spans[0] + spans[-1], tuple(spans[1:-1]))
    return token, out.past_key_values, lap


def _typical(laps: Sequence[Lap]) -> Lap:
    """Medians, and what they leave of the mean."""
    inside = zip(*(lap.layers for lap in laps), strict=True)
    middle = Lap(statistics.median(lap.outside for lap in laps), tuple(map(statistics.median, inside)))
    return replace(middle, lost=statistics.fmean(lap.total for lap in laps) - middle.total)


def compare(dense: nn.Module, small: nn.Module, request: Request, *, rounds: int = ROUNDS) -> dict[str, float]:
    """Both models on a request in turns: milliseconds of the small one, and how many times faster it is (medians)."""
    first, second = time_models([dense, small], request, rounds=rounds)
    return compared(first, second, request)


def compared(dense: Laps, small: Laps, request: Request) -> dict[str, float]:
    """What two models that took turns say about the second one."""
    ratios = [x / y for x, y in zip(dense.requests(request), small.requests(request), strict=True)]
    return {
        "prefill_ms": small.median("prefill"),
        "token_ms": small.median("decode"),
        "request_ms": statistics.median(small.requests(request)),
        "dense_request_ms": statistics.median(dense.requests(request)),
        "speedup": statistics.median(ratios),
    }
