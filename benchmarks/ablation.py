"""Which step of the method pays, one added after the other: benchmarks/results/ablation.json.

    python benchmarks/ablation.py --out runs/ablation --text wiki.test.raw --calibration wiki.train.raw

One run directory, changed from row to row, so that only what a row changes is computed again. Resumable by row.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import record

from prunus.config import resolve
from prunus.pipeline import compress, step
from prunus.progress import LineProgress

START = {"reform.order": "score", "reform.fisher": "0", "reform.method": "none", "reform.sequential": "false"}
START |= {"search.generations": "0", "reform.sensitivity": "0", "reform.openings": "0"}
ROWS: tuple[tuple[str, str, dict[str, str]], ...] = (  # what a row is called, the first step it changes, its settings
    ("OBS score, plain slices, knapsack", "score", START),
    ("+ closed form", "score", {"reform.method": "closed-form"}),
    ("+ greedy order", "score", {"reform.order": "greedy"}),
    ("+ curvature of the loss", "score", {"reform.fisher": "8"}),
    ("+ sequential pass, writers", "extract", {"reform.sequential": "true", "reform.readers": "none"}),
    ("+ sequential pass, readers too", "extract", {"reform.readers": "0.3"}),
    ("the same without drift in the target", "extract", {"reform.drift": "0"}),
    ("the same with a ridge of 0.03", "extract", {"reform.drift": "1", "reform.sequential_damping": "0.03"}),
    ("+ first tokens", "score", {"reform.sequential_damping": "0.3", "reform.openings": "1024"}),
    ("+ one measured level per sub-layer", "reform", {"reform.sensitivity": "1"}),
    ("+ evolution, KL", "search", {"search.generations": "2"}),
    ("+ evolution, perplexity", "search", {"search.objective": "ppl"}),
    ("random allocation, as many candidates", "search", {"search.objective": "kl", "search.method": "random"}),
)


def main() -> int:
    """Run every row that is not there, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", required=True, help="the test text")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", default="24")
    parser.add_argument("--holdout", default="16")
    parser.add_argument("--keep", default="0.9,0.5")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "ablation.json")
    options = parser.parse_args()
    done: Path = options.out / "rows.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text()) if done.exists() else []
    run = options.out / "run"
    flags = {"model": options.model, "keep": options.keep, "dtype": "bfloat16", "test_text": options.text}
    flags |= {"calibration.source": options.calibration, "calibration.samples": options.samples}
    flags |= {"calibration.holdout": options.holdout}
    for number, (title, first, settings) in enumerate(ROWS):
        if any(row["step"] == title for row in rows):
            continue
        if number == 0:
            data = compress(resolve(None, {**flags, **settings}), run, LineProgress())
        else:
            step(run, first, settings, LineProgress())  # type: ignore[arg-type]
            data = step(run, "report", {}, LineProgress())
        rows += [
            {
                "step": title,
                "kept": round(network["kept_blocks"], 2),
                "kl_nats": network["kl_nats"],
                "kl_se": network["kl_se"],
                "perplexity": next(iter(network["perplexity"].values())),
                "settings": settings,
            }
            for network in data["chosen"]
        ]
        done.write_text(json.dumps(rows))
        write(options, rows)
    write(options, rows)
    return 0


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The results file, as benchmarks/render.py reads it."""
    pivot = {"title": "kept of the blocks", "index": "step", "across": "kept", "across_format": ".0%", "best": "min"}
    views = {
        "main": {
            **pivot, "value": "kl_nats", "format": ".4f", "note": "KL to the dense model on held-out text, nats.",
        },
        "perplexity": {**pivot, "value": "perplexity", "format": ".2f", "note": "First 5 windows of 2048 tokens."},
    }  # fmt: skip
    record.write(options.results, rows, views)


if __name__ == "__main__":
    sys.exit(main())
