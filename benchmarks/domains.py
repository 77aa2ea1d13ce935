"""What calibration text decides, in other domains too: order, allocation, curvature: benchmarks/results/domains.json.

    python benchmarks/domains.py c4=RUN wiki=RUN2 --keep 0.8 --text wiki.test.raw c4.test.jsonl

Takes finished runs of `prunus compress` (or of `prunus bench`, in its folder `prunus/`) with different calibration
texts. Every network has the order, the second moments and the curvature of one run, and the allocation that one of them
found, or the knapsack's by the curves of this order; weights are one-shot. A share of the curvature is replaced by the
identity times its mean diagonal (`--shrink`). Each row is the perplexity of the first windows of the test texts.
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
from prunus.models import costs
from prunus.models.families import dims, family_of, full
from prunus.models.loading import load
from prunus.models.slicing import activate, sort
from prunus.models.stream import LayerStream
from prunus.reforming import levels, sensitivity
from prunus.scoring import moments
from prunus.searching.allocate import allocate
from prunus.searching.space import space_of
from prunus.subnetwork import SubNetwork


class Measured:
    """What a run measured: second moments and curvature of its text, for the model in its first order."""

    def __init__(self, run: Path, model: Any) -> None:
        self.run, self.model, self.family = run, model, family_of(model.config)
        self.layers = LayerStream(model, self.family).layers
        self.reform = json.loads((run / "manifest.json").read_text())["config"]["reform"]
        self.fisher = load_file(run / "fisher.safetensors")

    def writers(self, i: int, shrink: float) -> list[Tensor]:
        """Both writers of a layer as they are now, weighted by the shrunk curvature."""
        found = []
        for which, path in (("attention", self.family.attention_writer), ("mlp", self.family.mlp_writer)):
            root = moments.square_root(self.fisher[which][i], max(shrink, 0.01))
            found.append(root @ moments.writer_weight(self.layers[i], path).float())
        return found

    def ordered(self, shrink: float) -> levels.Levels:
        """Sort the model as a run with that curvature would have; its reformed levels."""
        rows, damping = [], self.reform["damping"]
        for i in range(len(self.layers)):
            grams = levels.read_grams(self.run / "grams", i, torch.device("cpu"))
            attention, mlp = self.writers(i, shrink)
            rows.append(
                levels.order_layer(grams, attention, mlp, dims(self.model.config), damping, self.reform["block"])
            )
        order = {unit: torch.stack([row[unit].cpu() for row in rows]).contiguous() for unit in rows[0]}
        sort(self.model, self.family, order)
        return levels.Levels(self.model, self.family, self.run / "grams", orders=order, damping=damping)

    def allocation(self, database: levels.Levels, shrink: float, keep: float) -> SubNetwork:
        """What the knapsack chooses by the curves of that curvature, no level of them measured."""
        rows, config = [], self.model.config
        for i in range(len(self.layers)):
            attention, mlp = self.writers(i, shrink)
            rows.append(levels.layer_errors(database.grams(i), attention, mlp, dims(config), self.reform["damping"]))
        errors = levels.Errors(torch.stack([a for a, _ in rows]), torch.stack([m for _, m in rows]))
        whole, layout = full(config), costs.layout(self.model, self.family)
        curves = sensitivity.curves(errors, [], layout, space_of(config), whole.hidden)
        dense = costs.parameters(layout, whole, "blocks")
        rest = dense - sum(curve.costs[0] for curve in curves)
        found = allocate([c.costs for c in curves], [c.nats for c in curves], keep * dense - rest)
        return sensitivity.subnetwork_of(curves, found.levels, whole.hidden)


def main() -> int:
    """Score every combination and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=RUN, at least one")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", default="0.8")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--shrink", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "domains.json")
    options = parser.parse_args()
    runs = {name: Path(path) for name, _, path in (word.partition("=") for word in options.runs)}
    texts: dict[str, Tensor] = {}
    allocations = {
        name: SubNetwork.from_json(
            json.loads((run / "models" / f"keep-{options.keep}" / "prunus.json").read_text())["subnetwork"]
        )
        for name, run in runs.items()
    }
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        for shrink in options.shrink:
            loaded = load(options.model, dtype=options.dtype)
            model, family = loaded.model, family_of(loaded.model.config)
            texts = texts or {text: text_ids(text, loaded.tokenizer) for text in options.text}
            measured = Measured(run, model)
            database = measured.ordered(shrink)
            own = measured.allocation(database, shrink, float(options.keep))
            for allocation, sub in {**allocations, "own curves": own}.items():
                row: dict[str, Any] = {"order": name, "shrink": shrink, "allocation": allocation}
                for number, (text, ids) in enumerate(texts.items()):
                    with activate(model, family, sub, database(sub)):
                        scored = perplexity(model, ids, length=options.length, chunks=options.chunks)
                    row |= {f"text{number}": Path(text).name, f"ppl{number}": scored.ppl}
                rows.append(row)
                print(row, flush=True)
    columns = [["order", "order and second moments of", ""], ["shrink", "identity's share of the curvature", ".1f"],
               ["allocation", "allocation of", ""]]  # fmt: skip
    columns += [[f"ppl{k}", Path(text).name, ".2f"] for k, text in enumerate(options.text)]
    note = f"Perplexity, {options.chunks} x {options.length} tokens; {options.keep} of the blocks, one-shot weights."
    record.write(options.results, rows, {"main": {"columns": columns, "note": note}}, command=record.typed())
    return 0


if __name__ == "__main__":
    sys.exit(main())
