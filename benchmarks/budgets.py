"""Milliseconds or parameters as the budget, at equal milliseconds: benchmarks/results/budgets.json.

    python benchmarks/budgets.py RUN --out runs/budgets --keep 0.8 0.6 0.5

RUN holds networks that were searched under a limit of parameters (`--keep`). How long each of them takes is read from
this device's table, and a copy of the run is searched anew under that limit of time (`--speedup`), by the same method
with the same effort. Both are reformed in one shot, without the sequential pass, and judged on the run's held-out
windows; then all checkpoints and the dense model take turns on the request. RUN itself is left alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import record
import runs

from prunus.config import BudgetConfig, CompressConfig
from prunus.models.families import family_of, full
from prunus.models.loading import load, load_configured
from prunus.pipeline import step
from prunus.progress import LineProgress
from prunus.recording.run import read_manifest
from prunus.subnetwork import SubNetwork
from prunus.timing import runtimes
from prunus.timing.latency import Laps, time_models
from prunus.timing.timetable import Timetable

LEFT_OUT = ("models", "weights", "evaluation")  # of the run: what follows its search
LIMITS = ("parameters", "milliseconds")
Row = dict[str, Any]
Pair = tuple[tuple[Path, str], tuple[Path, str]]  # run and network: within parameters, within milliseconds


def networks_of(run: Path, keep: list[float]) -> dict[float, SubNetwork]:
    """The networks that a run chose under its limits of parameters."""
    files = {k: run / "search" / f"keep-{k:g}.json" for k in keep}
    return {k: SubNetwork.from_json(json.loads(file.read_text())["subnetwork"]) for k, file in files.items()}


def evaluated(run: Path, name: str) -> dict[str, Any]:
    """What the run measured of a network."""
    found: dict[str, Any] = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return found


def in_turns(paths: list[str], budget: BudgetConfig, dtype: str, rounds: int) -> list[Laps]:
    """Times of checkpoints on the request, the dense model first."""
    models = [load(path, dtype=dtype, compress=False).model for path in paths]
    return time_models(models, runtimes.request_of(budget), rounds=rounds)


def searched(run: Path, out: Path, wanted: dict[float, float], request: dict[str, int]) -> dict[float, Pair]:
    """Copies of the run: with its own networks, and searched anew for those speed-ups; both reformed in one shot."""
    by_size, by_time = (
        folder if folder.exists() else runs.copied(run, folder, LEFT_OUT)
        for folder in (out / "parameters", out / "milliseconds")
    )
    one_shot = {"reform.sequential": False}
    step(by_size, "extract", one_shot, LineProgress())
    limits = {f"budget.{key}": value for key, value in request.items()} | {"budget.speedup": sorted(wanted.values())}
    step(by_time, "search", {**limits, "keep": []}, LineProgress())
    step(by_time, "extract", one_shot, LineProgress())
    return {k: ((by_size, f"keep-{k:g}"), (by_time, f"speedup-{s:g}")) for k, s in wanted.items()}


def row(pair: str, limit: str, run: Path, name: str, table: Timetable, ms: list[float], dense: list[float]) -> Row:
    """One network: what is left of it, its times (of every round, beside the dense model's), its divergence."""
    found = evaluated(run, name)
    sub = SubNetwork.from_json(json.loads((run / "search" / f"{name}.json").read_text())["subnetwork"])
    return {
        "pair": pair,
        "limit": limit,
        "kept_blocks": found["kept_blocks"],
        "heads": sum(layer.kv_heads * layer.q_per_kv for layer in sub.layers),
        "neurons": sum(layer.mlp for layer in sub.layers),
        "predicted_ms": table.request_ms(sub),
        "measured_ms": statistics.median(ms),
        "speedup": statistics.median(a / b for a, b in zip(dense, ms, strict=True)),
        "kl_nats": found["kl_nats"],
        "kl_se": found["kl_se"],
    }


def view(options: argparse.Namespace, table: Timetable, whole: SubNetwork) -> dict[str, Any]:
    """How benchmarks/render.py shows the rows."""
    columns = [
        ["pair", "kept by the first", ""], ["limit", "limit", ""], ["kept_blocks", "kept of the blocks", ".1%"],
        ["heads", "query heads", "d"], ["neurons", "neurons", "d"], ["predicted_ms", "ms, by the table", ".1f"],
        ["measured_ms", "measured", ".1f"], ["speedup", "speed-up", ".3f"], ["kl_nats", "KL, nats", ".4f"],
        ["kl_se", "± s.e.", ".4f"],
    ]  # fmt: skip
    heads = sum(layer.kv_heads * layer.q_per_kv for layer in whole.layers)
    note = (
        f"Requests of {options.batch} x {options.prompt} tokens, {options.generate} generated; {table.key['runtime']}, "
        f"{table.key['dtype']}, {table.key['threads']} thread(s), medians of {options.rounds} rounds. The dense model "
        f"has {heads} query heads and {sum(layer.mlp for layer in whole.layers)} neurons."
    )
    return {"columns": columns, "note": note}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "budgets.json")
    return parser.parse_args()


def main() -> int:
    """Search, judge, time, write the results file."""
    options = parsed()
    request = {key: getattr(options, key) for key in ("prompt", "batch", "generate")}
    budget, config = BudgetConfig(**request), CompressConfig.from_dict(read_manifest(options.run)["config"])
    model = load_configured(config).model
    table = runtimes.measure(model, family_of(model.config), budget, progress=LineProgress())
    dtype, whole = str(model.dtype).removeprefix("torch."), full(model.config)
    del model
    own = networks_of(options.run, options.keep)
    wanted = {k: math.ceil(1000 * table.request_ms(whole) / table.request_ms(sub)) / 1000 for k, sub in own.items()}
    pairs = searched(options.run, options.out, wanted, request)
    paths = [str(run / "models" / name) for pair in pairs.values() for run, name in pair]
    dense, *times = (
        laps.requests(table.request) for laps in in_turns([config.model, *paths], budget, dtype, options.rounds)
    )
    limits = [(f"{k:.0%}", limit, *one) for k, pair in pairs.items() for limit, one in zip(LIMITS, pair, strict=True)]
    rows = [row(*of, table, ms, dense) for of, ms in zip(limits, times, strict=True)]
    for one in rows:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in one.items()})
    record.write(options.results, rows, {"main": view(options, table, whole)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
