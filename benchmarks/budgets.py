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
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import record

from prunus.config import BudgetConfig, CompressConfig
from prunus.models.families import dims, family_of, full
from prunus.models.loading import load, load_configured
from prunus.pipeline import step
from prunus.progress import LineProgress
from prunus.recording.run import read_manifest
from prunus.subnetwork import SubNetwork
from prunus.timing import runtimes
from prunus.timing.latency import Laps, time_models

WRITTEN = ("manifest.json", "config.yaml", "trials.journal", "trials.journal.claims")  # files that a run writes into


def copied(run: Path, out: Path) -> Path:
    """A copy of a run up to its search: hard links where files are only read."""

    def copy(source: str, target: str) -> None:
        (shutil.copy2 if Path(source).name in WRITTEN else os.link)(source, target)

    left_out = {".prunus", "report", "models", "weights", "evaluation"}
    if not out.exists():
        shutil.copytree(run, out, copy_function=copy, ignore=lambda _, names: left_out & set(names))
    return out


def names_of(run: Path, keep: list[float]) -> dict[float, SubNetwork]:
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


def main() -> int:
    """Search, judge, time, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "budgets.json")
    options = parser.parse_args()
    budget = BudgetConfig(prompt=options.prompt, batch=options.batch, generate=options.generate)
    config = CompressConfig.from_dict(read_manifest(options.run)["config"])
    loaded = load_configured(config)
    table = runtimes.measure(loaded.model, family_of(loaded.model.config), budget, progress=LineProgress())
    dtype, whole = str(loaded.model.dtype).removeprefix("torch."), full(loaded.model.config)
    dense_ms, size = table.request_ms(whole), dims(loaded.model.config)
    del loaded
    wanted = {
        k: math.ceil(1000 * dense_ms / table.request_ms(sub)) / 1000
        for k, sub in names_of(options.run, options.keep).items()
    }
    by_size, by_time = (
        copied(options.run, options.out / "parameters"),
        copied(options.run, options.out / "milliseconds"),
    )
    one_shot = {"reform.sequential": False}
    step(by_size, "extract", one_shot, LineProgress())
    request = {f"budget.{key}": getattr(options, key) for key in ("prompt", "batch", "generate")}
    step(by_time, "search", {**request, "keep": [], "budget.speedup": sorted(wanted.values())}, LineProgress())
    step(by_time, "extract", one_shot, LineProgress())
    pairs = {k: ((by_size, f"keep-{k:g}"), (by_time, f"speedup-{s:g}")) for k, s in wanted.items()}
    paths = [str(run / "models" / name) for pair in pairs.values() for run, name in pair]
    laps = in_turns([config.model, *paths], budget, dtype, options.rounds)
    times = iter([own.requests(runtimes.request_of(budget)) for own in laps[1:]])
    dense = laps[0].requests(runtimes.request_of(budget))
    rows: list[dict[str, Any]] = []
    for keep, pair in pairs.items():
        for limit, (run, name) in zip(("parameters", "milliseconds"), pair, strict=True):
            found, ms = evaluated(run, name), next(times)
            sub = SubNetwork.from_json(json.loads((run / "search" / f"{name}.json").read_text())["subnetwork"])
            rows.append(
                {
                    "pair": f"{keep:.0%}",
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
            )
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    columns = [
        ["pair", "kept by the first", ""],
        ["limit", "limit", ""],
        ["kept_blocks", "kept of the blocks", ".1%"],
        ["heads", "query heads", "d"],
        ["neurons", "neurons", "d"],
        ["predicted_ms", "ms, by the table", ".1f"],
        ["measured_ms", "measured", ".1f"],
        ["speedup", "speed-up", ".3f"],
        ["kl_nats", "KL, nats", ".4f"],
        ["kl_se", "± s.e.", ".4f"],
    ]
    n = len(whole.layers)
    note = (
        f"Requests of {options.batch} x {options.prompt} tokens, {options.generate} generated; {table.key['runtime']}, "
        f"{table.key['dtype']}, {table.key['threads']} thread(s), medians of {options.rounds} rounds. The dense model "
        f"has {n * size['kv_heads'] * size['q_per_kv']} query heads and {n * size['mlp']} neurons."
    )
    record.write(options.results, rows, {"main": {"columns": columns, "note": note}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
