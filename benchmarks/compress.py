"""Compress the demo model on several calibration texts and score every checkpoint: benchmarks/results/compress.json.

    python benchmarks/compress.py --out runs/bench --text wiki.test.raw wikitext2=wiki.train.raw generated=generated

Resumable: runs and scores that are there are not made again. Scores are perplexities of `prunus evaluate` in windows
of 2048 and of 128 tokens; the first 5 (24) windows are the quick protocol. `--rivals` adds rows of another json.
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

from prunus.config import resolve
from prunus.evaluation import perplexity, text_ids
from prunus.models.loading import load
from prunus.pipeline import compress
from prunus.progress import LineProgress

PROTOCOLS = ((2048, 40, 5), (128, 320, 24))  # length, windows, windows of the quick protocol


def scores(checkpoint: str, text: str, dtype: str, cache: Path, *, quick_only: bool = False) -> dict[str, float]:
    """Perplexities of one checkpoint, from the cache where it has them."""
    if cache.exists():
        return dict(json.loads(cache.read_text()))
    loaded = load(checkpoint, dtype=dtype, compress=False)
    ids = text_ids(text, loaded.tokenizer)
    found: dict[str, float] = {}
    for length, windows, quick in PROTOCOLS:
        result = perplexity(loaded.model, ids, length=length, chunks=quick if quick_only else windows)
        if not quick_only:
            found[f"ppl{length}"] = result.ppl
        found[f"ppl{length}_quick"] = math.exp(statistics.fmean(result.per_chunk[:quick]))
        found[f"nats{length}_se"] = result.se or 0.0
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(found))
    return found


def rows_of(name: str, asked: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run, and a row for each of its checkpoints."""
    out, (source, *own) = options.out / name, asked.split(";")
    flags = {"model": options.model, "keep": tuple(options.keep), "dtype": options.dtype, "calibration.source": source}
    flags |= dict(item.split("=", 1) for item in (*options.set, *own))
    data = compress(resolve(None, flags), out, LineProgress())
    steps = {step["name"]: step for step in data["steps"]}
    rows = []
    for network in data["chosen"]:
        row = {
            "calibration": name,
            "method": f"Prunus, {name}",
            "kept": round(network["kept_blocks"], 2),
            "kept_blocks": network["kept_blocks"],
            "kept_all": network["kept_all"],
            "parameters": network["parameters"],
            "kl_nats": network["kl_nats"],
            "prefill_speedup": network["prefill_speedup"],
            "decode_speedup": network["decode_speedup"],
            "seconds": sum(step["seconds"] for step in steps.values()),
            "search_tokens": steps["search"]["forward_tokens"],
            "forward_tokens": sum(step["forward_tokens"] for step in steps.values()),
            "peak_mb": max(step["peak_bytes"] for step in steps.values()) / 1e6,
        }
        cache = options.out / "scores" / f"{name}-{network['name']}.json"
        quick = name in options.quick
        row |= scores(str(out / network["path"]), options.text, options.dtype, cache, quick_only=quick)
        rows.append(row)
    return rows


def rivals(path: Path) -> list[dict[str, Any]]:
    """Rows of other methods, from a json with a table of perplexities by method and ratio for each window length."""
    raw = json.loads(path.read_text())
    return [
        {"method": method, "kept": float(kept), "ppl2048_quick": value, "ppl128_quick": raw["ppl128"][method][kept]}
        for method, table in raw["ppl2048"].items()
        for kept, value in table.items()
        if method != "dense" and not method.startswith("proto:") and kept in raw["ppl128"].get(method, {})
    ]


def views() -> dict[str, Any]:
    """How benchmarks/render.py shows the rows."""
    pivot = {"title": "kept of the blocks", "index": "method", "across": "kept", "across_format": ".0%"}
    pivot |= {"format": ".2f", "best": "min", "reference": ["dense"]}
    full = {"where": {"full": True}}
    return {
        "main": {
            **pivot,
            "value": "ppl2048_quick",
            "note": "Perplexity, first 5 windows of 2048 tokens. All rows but ours and dense are read from the file of "
            "`--rivals`: measured elsewhere, each with a calibration of its own.",
        },
        "final": {**pivot, **full, "value": "ppl2048", "note": "Perplexity, 40 windows of 2048 tokens."},
        "short": {**pivot, **full, "value": "ppl128", "note": "Perplexity, 320 windows of 128 tokens."},
        "short_quick": {**pivot, "value": "ppl128_quick", "note": "Perplexity, first 24 windows of 128 tokens."},
        "cost": {
            "where": {"timed": True},
            "columns": [
                ["method", "run", ""],
                ["kept", "kept", ".0%"],
                ["parameters", "parameters", ",d"],
                ["kl_nats", "KL, nats", ".4f"],
                ["prefill_speedup", "prefill speed", ".2f"],
                ["decode_speedup", "decode speed", ".2f"],
                ["seconds", "seconds of the whole run", ".0f"],
                ["search_tokens", "forward tokens of the search", ",.0f"],
                ["forward_tokens", "of the whole run", ",.0f"],
                ["peak_mb", "peak memory, MB", ",.0f"],
            ],
        },
    }


def main() -> int:
    """Make the runs, score them, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=SOURCE[;KEY=VALUE...]", help="a run")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", required=True, help="the test text")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rivals", type=Path)
    parser.add_argument("--quick", nargs="*", default=[], metavar="NAME", help="runs scored on the quick protocol only")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "compress.json")
    options = parser.parse_args()
    dense = scores(options.model, options.text, options.dtype, options.out / "scores" / "dense.json")
    rows = [{"method": "dense", "full": True, "kept": keep, **dense} for keep in options.keep]
    for item in options.runs:
        name, _, asked = item.partition("=")
        rows += [{**row, "full": name not in options.quick, "timed": True} for row in rows_of(name, asked, options)]
    if options.rivals:
        rows += rivals(options.rivals)
    record.write(options.results, rows, views())
    return 0


if __name__ == "__main__":
    sys.exit(main())
