"""What calibration text decides, in other domains too: order, allocation, curvature: benchmarks/results/domains.json.

    python benchmarks/domains.py c4=RUN wiki=RUN2 --keep 0.8 --text wiki.test.raw c4.test.jsonl

Takes finished runs of `prunus compress` (or of `prunus bench`, in its folder `prunus/`) with different calibration
texts. Every network has the order, the second moments and the curvature of one run, and the allocation of one of them;
weights are one-shot. A share of the curvature is replaced by the identity times its mean diagonal (`--shrink`), in the
order alone; `reform.shrinkage` does it in the allocation too (the runs of the results file had .01). Each row is the
perplexity of the first windows of the test texts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import load_file
from torch import Tensor

from prunus.evaluation import perplexity, text_ids
from prunus.models.families import dims, family_of
from prunus.models.loading import load
from prunus.models.slicing import activate, sort
from prunus.models.stream import LayerStream
from prunus.reforming import levels
from prunus.scoring import moments
from prunus.subnetwork import SubNetwork


def order_of(model: Any, run: Path, shrink: float, damping: float, block: int) -> dict[str, Tensor]:
    """The order that a run would have had with a shrunk curvature, from what it measured."""
    family, stream = family_of(model.config), LayerStream(model, family_of(model.config))
    fisher, rows = load_file(run / "fisher.safetensors"), []
    for i, layer in enumerate(stream.layers):
        weighted = []
        for which, path in (("attention", family.attention_writer), ("mlp", family.mlp_writer)):
            root = moments.square_root(fisher[which][i], max(shrink, 0.01))
            weighted.append(root @ moments.writer_weight(layer, path).float())
        grams = levels.read_grams(run / "grams", i, torch.device("cpu"))
        rows.append(levels.order_layer(grams, weighted[0], weighted[1], dims(model.config), damping, block))
    return {unit: torch.stack([row[unit].cpu() for row in rows]).contiguous() for unit in rows[0]}


def main() -> int:
    """Score every combination and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=RUN, at least one")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", nargs="+", default=["0.8"])
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--shrink", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "domains.json")
    options = parser.parse_args()
    runs = {name: Path(path) for name, _, path in (word.partition("=") for word in options.runs)}
    texts: dict[str, Tensor] = {}
    allocations = {
        (keep, name): SubNetwork.from_json(
            json.loads((run / "models" / f"keep-{keep}" / "prunus.json").read_text())["subnetwork"]
        )
        for keep in options.keep
        for name, run in runs.items()
    }
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        reform = json.loads((run / "manifest.json").read_text())["config"]["reform"]
        for shrink in options.shrink:
            loaded = load(options.model, dtype=options.dtype)
            model, family = loaded.model, family_of(loaded.model.config)
            texts = texts or {text: text_ids(text, loaded.tokenizer) for text in options.text}
            order = order_of(model, run, shrink, reform["damping"], reform["block"])
            sort(model, family, order)
            database = levels.Levels(model, family, run / "grams", orders=order, damping=reform["damping"])
            for (keep, allocation), sub in allocations.items():
                row: dict[str, Any] = {"kept": float(keep), "order": name, "shrink": shrink, "allocation": allocation}
                for number, (text, ids) in enumerate(texts.items()):
                    with activate(model, family, sub, database(sub)):
                        scored = perplexity(model, ids, length=options.length, chunks=options.chunks)
                    row |= {f"text{number}": Path(text).name, f"ppl{number}": scored.ppl}
                rows.append(row)
                print(row, flush=True)
            write(options, rows)
    return 0


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The results file, as benchmarks/render.py reads it."""
    columns = [["kept", "kept of the blocks", ".0%"], ["order", "order and second moments of", ""],
               ["shrink", "identity's share of the curvature", ".2f"], ["allocation", "allocation of", ""]]  # fmt: skip
    columns += [[f"ppl{k}", Path(text).name, ".2f"] for k, text in enumerate(options.text)]
    note = f"Perplexity, {options.chunks} x {options.length} tokens; one-shot weights."
    view: dict[str, Any] = {"columns": columns, "note": note}
    if len(options.runs) == len(options.text) == 1:  # nothing but shares of the identity to compare
        note = f"Perplexity, {options.chunks} x {options.length} tokens of {rows[0]['text0']}; one-shot weights."
        view = {"title": "identity's share of the curvature", "index": "shrink", "across": "kept",
                "across_format": ".0%", "value": "ppl0", "format": ".2f", "best": "min", "note": note}  # fmt: skip
    record.write(options.results, rows, {"main": view}, command=record.typed())


if __name__ == "__main__":
    sys.exit(main())
