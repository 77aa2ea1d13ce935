"""Ablations that the two papers show, on our model and with our method: benchmarks/results/papers.json.

    python benchmarks/papers.py samples --out runs/papers --text wiki.test.raw --calibration wiki.train.raw
    python benchmarks/papers.py parts --out runs/papers --text wiki.test.raw --calibration wiki.train.raw

`samples`: how many calibration windows reformation needs, none at all among them (Shen et al. 2024, arXiv:2409.17372,
figure 6: 0, 128, 512, 1024). `parts`: attention alone, MLP alone, both (figures 4 and 5). Orders, error curves and
knapsack as always, without evolution, measured levels and sequential pass, so that one thing differs between two rows.
A row is a run of its own; resumable by row. Each part keeps the rows of the other that the results file holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import record

from prunus.config import resolve
from prunus.models.families import dims
from prunus.models.loading import load
from prunus.pipeline import compress
from prunus.progress import LineProgress

COMMON = {"dtype": "bfloat16", "reform.sequential": "false", "reform.sensitivity": "0", "search.generations": "0"}
SAMPLES = (0, 32, 128, 512)


def rows_of(part: str, model: str) -> dict[str, dict[str, str]]:
    """What each row is called, and its settings."""
    if part == "samples":
        return {
            f"{n} windows" if n else "not reformed (order by 32 windows)": {
                "calibration.samples": str(n or 32),
                "reform.method": "closed-form" if n else "none",
            }
            for n in SAMPLES
        }
    width = dims(load(model).model.config)["mlp"]
    return {
        "attention alone": {"search.mlp_step": str(width), "search.depth": "false"},
        "MLP alone": {"search.attention": "none", "search.depth": "false"},
        "both": {"search.depth": "false"},
        "both, whole sub-layers too": {},
    }


def main() -> int:
    """Run every row that is not there, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["samples", "parts"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", required=True, help="the test text")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--length", default="512", help="tokens in a calibration window")
    parser.add_argument("--samples", default="64", help="windows, for `parts`")
    parser.add_argument("--test-length", default="2048", help="tokens in a test window, of which there are 5")
    parser.add_argument("--keep", default="0.9,0.8")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "papers.json")
    options = parser.parse_args()
    done = options.out / f"{options.part}.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text()) if done.exists() else []
    for title, settings in rows_of(options.part, options.model).items():
        if any(row["setting"] == title for row in rows):
            continue
        flags = {"model": options.model, "keep": options.keep, "test_text": options.text, **COMMON}
        flags |= {"test_length": options.test_length}
        flags |= {"calibration.source": options.calibration, "calibration.length": options.length}
        flags |= {"calibration.samples": options.samples, "calibration.holdout": "16"}
        run = options.out / options.part / title.replace(" ", "-")
        data = compress(resolve(None, {**flags, **settings}), run, LineProgress())
        rows += [
            {
                "part": options.part, "setting": title, "kept": round(network["kept_blocks"], 2),
                "kl_nats": network["kl_nats"], "kl_se": network["kl_se"], "layers": network["layers"],
                "perplexity": next(iter(network["perplexity"].values())), "settings": settings,
            }
            for network in data["chosen"]
        ]  # fmt: skip
        done.write_text(json.dumps(rows))
        shutil.rmtree(run)
    write(options, rows)
    return 0


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The results file, as benchmarks/render.py reads it."""
    old = json.loads(options.results.read_text()) if options.results.exists() else {"rows": [], "commands": {}}
    commands = {**old["commands"], options.part: record.typed()}
    pivot = {"title": "kept of the blocks", "index": "setting", "across": "kept", "across_format": ".0%", "best": "min"}
    kl = f"KL to the dense model on held-out windows of {options.length} tokens, nats."
    perplexity = f"Perplexity, first 5 windows of {options.test_length} tokens."
    views = {
        part: {**pivot, "where": {"part": part}, "value": "perplexity", "format": ".2f", "note": perplexity}
        for part in ("samples", "parts")
    }  # of `samples` no divergence: with other windows to calibrate on, other ones are held out
    views["parts-kl"] = {**pivot, "where": {"part": "parts"}, "value": "kl_nats", "format": ".4f", "note": kl}
    kept = [row for row in old["rows"] if row["part"] != options.part]
    record.write(options.results, [*kept, *rows], views, command="; ".join(commands.values()), commands=commands)


if __name__ == "__main__":
    sys.exit(main())
