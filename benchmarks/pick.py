"""A pick against the network that a full run gives at the same budget: seconds and divergence: results/pick.json.

    python benchmarks/pick.py RUN --out runs/pick --keep 0.8 0.7 0.6 --refit 0 4 8

For every ratio the run is copied without its network of that ratio, and `prunus pick` is asked for it there, as a
command of its own (its seconds include starting Python and reading the model). Then both are measured on the run's
held-out windows. RUN itself is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import runs

FOLDERS = {"search": ".json", "weights": ".safetensors", "evaluation": ".json", "models": ""}


def without(run: Path, name: str, out: Path) -> Path:
    """A copy of a run that never had the network `name`."""
    shutil.rmtree(out, ignore_errors=True)
    runs.copied(run, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["config"]["keep"] = [k for k in manifest["config"]["keep"] if f"keep-{k:g}" != name]
    for folder, suffix in FOLDERS.items():
        file = f"{folder}/{name}{suffix}"
        manifest["artefacts"].pop(file, None)
        if (out / file).is_dir():
            shutil.rmtree(out / file)
        else:
            (out / file).unlink(missing_ok=True)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def prunus(*typed: str | Path) -> tuple[float, float]:
    """Run one command of Prunus; its seconds on the clock, and those of all its threads on a processor."""
    start, spent = time.perf_counter(), sum(os.times()[2:4])
    subprocess.run([sys.executable, "-m", "prunus", *map(str, typed)], check=True)
    return time.perf_counter() - start, sum(os.times()[2:4]) - spent


def row(run: Path, keep: float, refit: int | None, out: Path) -> dict[str, Any]:
    """One pick: seconds without measuring it, then its figures and those of the run's own network."""
    name, copy = f"keep-{keep:g}", out / f"without-{keep:g}"
    if not copy.exists():
        without(run, name, copy)
    shutil.rmtree(copy / "models" / f"pick-{keep:g}", ignore_errors=True)
    (copy / "weights" / f"pick-{keep:g}.safetensors").unlink(missing_ok=True)
    found = out / "found.json"
    asked = ["pick", copy, "--keep", f"{keep:g}", *([] if refit is None else ["--refit", str(refit)]), "--json", found]
    seconds, cpu = prunus(*asked, "--quiet")
    prunus(*asked, "--measure", "--quiet")
    (mine,) = json.loads(found.read_text())["chosen"]
    own = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return {
        "windows": "default" if refit is None else str(refit),
        "kept": keep,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "kl_nats": mine["kl_nats"],
        "full_run_kl_nats": own["kl_nats"],
        "excess": mine["kl_nats"] / own["kl_nats"] - 1,
        "predicted_kl_nats": mine["predicted_kl_nats"],
        "predicted_off": mine["predicted_kl_nats"] / mine["kl_nats"] - 1,
        "predicted_factor": mine["predicted_factor"],
    }


def main() -> int:
    """Make the picks, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.6])
    parser.add_argument("--refit", type=int, nargs="*", default=[], help="windows, beside the default")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "pick.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row(options.run, keep, refit, options.out) for refit in (None, *options.refit) for keep in options.keep]
    columns = [
        ["windows", "windows of the pass", ""],
        ["kept", "kept", ".0%"],
        ["seconds", "seconds", ".1f"],
        ["cpu_seconds", "of the processor", ".1f"],
        ["kl_nats", "KL, nats", ".4f"],
        ["full_run_kl_nats", "of the full run", ".4f"],
        ["excess", "more", "+.1%"],
        ["predicted_kl_nats", "predicted", ".4f"],
        ["predicted_off", "off by", "+.1%"],
    ]
    note = "KL on the run's held-out windows; seconds of the whole command, without --measure."
    record.write(options.results, rows, {"main": {"columns": columns, "note": note}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
