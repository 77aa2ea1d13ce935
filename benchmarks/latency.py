"""Is the latency table right? Predicted against measured times of whole networks: benchmarks/results/latency.json.

    python benchmarks/latency.py --model demo --threads 2
    python benchmarks/latency.py --model demo --threads 1 --runtime llama.cpp --quant q8_0
    python benchmarks/latency.py --model demo --threads 1 --runtime torch.compile

Probes, the dense model and all networks take turns in the same rounds, so that other load on the machine falls on all
of them; every figure is a median. Networks are random points of the search space at each share of the blocks'
parameters: ragged ones (sub-layers are dropped too), and uniform ones. `--clock cpu` counts the processor time of this
process, for a machine whose cores others use too; with one thread it is the wall clock's where the machine is idle.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch

from prunus.models import costs
from prunus.models.families import dims, family_of, full
from prunus.models.loading import load
from prunus.models.slicing import extract, layers_of
from prunus.progress import LineProgress
from prunus.recording import pictures
from prunus.searching.moves import Prices, scatter
from prunus.searching.space import space_of
from prunus.subnetwork import SubNetwork
from prunus.timing import compiled_latency, llamacpp_latency, whole_networks
from prunus.timing.latency import Laps, WallClock, assemble, build, clock_of, key_of, plan, time_models
from prunus.timing.timetable import Phase, Request, Timetable, grid_of

PHASES: tuple[Phase, ...] = ("prefill", "decode")


class ProcessorClock(WallClock):
    """Processor time of this process, in all its threads."""

    def mark(self) -> None:
        self.marks.append(1e3 * time.process_time())


def networks(model: Any, layout: costs.Layout, keep: list[float]) -> dict[str, SubNetwork]:
    """A ragged and a uniform network for every share."""
    whole, found = full(model.config), {}

    def blocks(sub: SubNetwork) -> float:
        return float(costs.parameters(layout, sub))

    for uniform, slack in ((False, 0.005), (True, 0.02)):
        space = space_of(model.config, uniform=uniform)
        prices = Prices(space, blocks)
        for share in keep:
            window = space.window(blocks, share, of=blocks(whole), slack=slack)
            name = f"{'uniform' if uniform else 'ragged'}, {share:.0%}"
            found[name] = scatter(prices, window, random.Random(f"{uniform} {share}"))
    return found


def rows_of(
    table: Timetable, layout: costs.Layout, dense: Laps, timed: dict[str, tuple[SubNetwork, Laps]], width: float
) -> list[dict[str, Any]]:
    """A row for every network and phase, and one for each phase as a whole."""
    whole, request = timed["dense"][0], table.request
    rows: list[dict[str, Any]] = []
    context = request.prompt + request.generate // 2

    def work(sub: SubNetwork, phase: Phase) -> float:
        if phase == "decode":
            return costs.decode_bytes(layout, sub, context, request.batch, width)
        inside = costs.flops(layout, sub, request.prompt, request.batch, of="blocks")
        outside = costs.flops(layout, sub, request.prompt, request.batch, of="all") - inside
        return inside + outside / request.prompt  # the head sees the last position only

    for name, (sub, laps) in timed.items():
        for phase in PHASES:
            measured, predicted = laps.median(phase), table.ms(sub, phase)
            pairs = zip(dense.of(phase), laps.of(phase), strict=True)
            speedup = statistics.median(a.total / b.total for a, b in pairs)
            ratio = work(whole, phase) / work(sub, phase)
            rows.append(
                {
                    "network": name,
                    "phase": phase,
                    "kept_blocks": costs.parameters(layout, sub) / costs.parameters(layout, whole),
                    "measured_ms": measured,
                    "predicted_ms": predicted,
                    "error": predicted / measured - 1,
                    "speedup": speedup,
                    "predicted_speedup": table.ms(whole, phase) / predicted,
                    "work_ratio": ratio,
                    "delivered": speedup / ratio,
                    "layers": [list(vars(layer).values()) for layer in sub.layers],
                }
            )
    for phase in PHASES:
        own = [row for row in rows if row["phase"] == phase and row["network"] != "dense"]
        errors = [abs(row["error"]) for row in own]
        apart = [abs(row["predicted_speedup"] / row["speedup"] - 1) for row in own]
        rows.append(
            {
                "summary": True,
                "phase": phase,
                "networks": len(own),
                "median_error": statistics.median(errors),
                "largest_error": max(errors),
                "median_speedup_error": statistics.median(apart),
                "largest_speedup_error": max(apart),
                "least_delivered": min(row["delivered"] for row in own),
            }
        )
    return rows


def views() -> dict[str, Any]:
    """How benchmarks/render.py shows the rows."""
    columns = [
        ["network", "network", ""],
        ["kept_blocks", "kept of the blocks", ".1%"],
        ["measured_ms", "measured, ms", ".1f"],
        ["predicted_ms", "by the table, ms", ".1f"],
        ["error", "error", "+.1%"],
        ["speedup", "speed-up, measured", ".2f"],
        ["predicted_speedup", "by the table", ".2f"],
    ]
    work = {
        "prefill": ["work_ratio", "FLOPs, dense / its", ".2f"],
        "decode": ["work_ratio", "bytes, dense / its", ".2f"],
    }
    share = ["delivered", "speed-up delivered of that", ".0%"]
    return {
        "main": {
            "where": {"summary": True},
            "columns": [
                ["phase", "phase", ""],
                ["networks", "networks", "d"],
                ["median_error", "error of the milliseconds, median", ".1%"],
                ["largest_error", "largest", ".1%"],
                ["median_speedup_error", "error of the speed-up, median", ".1%"],
                ["largest_speedup_error", "largest", ".1%"],
                ["least_delivered", "least share of the promised speed-up", ".0%"],
            ],
        },
        **{
            phase: {"where": {"phase": phase, "summary": None}, "columns": [*columns, work[phase], share]}
            for phase in PHASES
        },
    }


def asked() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--generate", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--picture", type=Path, help="draw the table's stairs: FILE.png and FILE.svg")
    parser.add_argument("--runtime", choices=["torch", "torch.compile", "llama.cpp"], default="torch")
    parser.add_argument("--quant", choices=list(llamacpp_latency.BITS), default="q8_0", help="of llama.cpp's files")
    parser.add_argument("--results", type=Path, help="by default benchmarks/results/latency[_RUNTIME].json")
    options = parser.parse_args()
    names = {"torch": "latency", "torch.compile": "latency_compiled", "llama.cpp": "latency_llamacpp"}
    name = f"{names[options.runtime]}.json"
    options.results = options.results or Path(__file__).parent / "results" / name
    return options


Timed = dict[str, tuple[SubNetwork, Laps]]


def in_torch(
    model: Any, chosen: dict[str, SubNetwork], request: Request, options: argparse.Namespace
) -> tuple[Timetable, Laps, list[Laps]]:
    """The table, the dense model's times, and those of the networks, measured together."""
    family, grid = family_of(model.config), grid_of(dims(model.config))
    plans = plan(grid, len(layers_of(model, family)))
    probes = [build(model, family, probe, grid) for probe in plans]
    small = [extract(model, family, sub) for sub in chosen.values()]
    with LineProgress()("rounds", options.rounds + 1) as advance:
        laps = time_models(
            [*probes, model, *small],
            request,
            rounds=options.rounds,
            doors=[layers_of(probe, family) for probe in probes],
            clock=ProcessorClock(model.device) if options.clock == "cpu" else clock_of(model.device),
            advance=advance,
        )
    key, n = key_of(model, family, request, grid), len(probes)
    return assemble(key, request, full(model.config), grid, plans, laps[: n + 1]), laps[n], laps[n + 1 :]


def in_other(
    model: Any, chosen: dict[str, SubNetwork], request: Request, options: argparse.Namespace
) -> tuple[Timetable, Laps, list[Laps]]:
    """The same elsewhere: the networks that the table is fitted to take turns with those that it is held against."""
    family, grid = family_of(model.config), grid_of(dims(model.config))
    turns: dict[str, Any] = {"rounds": options.rounds, "progress": LineProgress()}
    if options.runtime == "llama.cpp":
        planned = llamacpp_latency.plan_of(model, family, grid)
        key = llamacpp_latency.key_of(model, family, request, grid, options.quant)
        everything = [*planned.networks, *chosen.values()]
        prefill, decode = llamacpp_latency.time_networks(model, family, everything, request, options.quant, **turns)
    else:
        planned = compiled_latency.plan_of(model, family, grid)
        key = compiled_latency.key_of(model, family, request, grid)
        prefill, decode = compiled_latency.time_networks(
            model, family, [*planned.networks, *chosen.values()], request, **turns
        )
    n = len(planned.networks)
    table = whole_networks.fitted(key, request, grid, planned, prefill[:, :n], decode[:, :n])
    laps = whole_networks.laps_of(prefill, decode)
    return table, laps[0], laps[n:]


def main() -> int:
    """Measure, compare, write the results file."""
    options = asked()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load(options.model, dtype=options.dtype, device=options.device).model
    whole, layout = full(model.config), costs.layout(model, family_of(model.config))
    request = Request(options.prompt, options.batch, options.generate)
    chosen = networks(model, layout, options.keep)
    table, dense, others = (in_torch if options.runtime == "torch" else in_other)(model, chosen, request, options)
    key = table.key
    timed: Timed = {"dense": (whole, dense)} | {
        name: (sub, own) for (name, sub), own in zip(chosen.items(), others, strict=True)
    }
    width = next(model.parameters()).element_size()
    if options.runtime == "llama.cpp":
        width = llamacpp_latency.BITS[options.quant] / 8
    rows = rows_of(table, layout, dense, timed, width)
    note = f"Requests of {request.batch} x {request.prompt} tokens, {request.generate} generated; {options.rounds} "
    note += f"rounds; {key['dtype']}, {key['threads']} threads, {options.clock} clock, {key['runtime']}. "
    note += f"Unrest of the machine {table.spread:.1%}."
    shown = {name: {**view, "note": note} for name, view in views().items()}
    record.write(options.results, rows, shown, table=json.loads(table.to_json()))
    if options.picture:
        pictures.save(pictures.staircase(table), options.picture)
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "layers"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
