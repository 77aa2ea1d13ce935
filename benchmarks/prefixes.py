"""Sub-networks as plain prefixes and as reformed ones, before and after training: benchmarks/results/prefixes.json.

    python benchmarks/prefixes.py plain=RUN reformed=RUN2

Runs of `prunus compress --train` with the same model, calibration and training text, named by how they were trained.
The networks are those of the first run's pool nearest to a few sizes, the same widths in all layers; their loss is
taken on the run's held-out training windows. A network is reformed by the moments of the weights that it is read from.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import record
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from prunus.config import CompressConfig
from prunus.evaluation import perplexity
from prunus.models import costs
from prunus.models.families import family_of, full
from prunus.models.loading import load, load_configured
from prunus.models.slicing import activate, sort
from prunus.models.stream import LayerStream
from prunus.recording import pictures
from prunus.reforming.levels import Levels, save_grams, unsorted
from prunus.scoring import moments
from prunus.subnetwork import SubNetwork
from prunus.texts.instructions import windows_of

Subs = dict[float, SubNetwork]  # by their share of all parameters
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of all parameters


def networks(run: Path, layout: costs.Layout, whole: SubNetwork) -> Subs:
    """The networks of a pool that are nearest to the sizes."""
    pool = [SubNetwork.from_json(text) for text in json.loads((run / "pool.json").read_text())["networks"]]
    size = {sub: costs.parameters(layout, sub, "all") / costs.parameters(layout, whole, "all") for sub in pool}
    found = {share: min(pool, key=lambda sub: abs(size[sub] - share)) for share in SHARES}
    return {size[sub]: sub for sub in found.values()}


def rows_of(
    name: str,
    model: Any,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    subs: dict[float, SubNetwork],
    folder: Path,
) -> list[dict[str, Any]]:
    """Nats per token of every network, plain and reformed by moments that are taken here."""
    family = family_of(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    moments.collect(LayerStream(model, family), calibration, lambda i, found: save_grams(found, folder, i))
    database = Levels(model, family, folder, orders=unsorted(model), damping=0.003)
    rows = []
    for kept, sub in subs.items():
        for reading, override in (("plain", {}), ("reformed", database(sub))):
            with activate(model, family, sub, override):
                nats = perplexity(model, held_out.flatten(), length=held_out.shape[1], bos=False).nats
            rows.append(
                {"weights": f"{name}, run {reading}", "kept_all": round(kept, 3), "nats": nats, "of": sub.to_json()}
            )
            print(rows[-1]["weights"], f"{kept:.3f} {nats:.4f}", flush=True)
    return rows


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Loss against size: a colour for how the weights were trained, dashed where prefixes are plain."""
    with mpl.rc_context(pictures.STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        ax = figure.subplots()
        for name in dict.fromkeys(row["weights"] for row in rows):
            own = [(100 * row["kept_all"], row["nats"]) for row in rows if row["weights"] == name]
            trained = name.rpartition(",")[0]
            number = list(dict.fromkeys(row["weights"].rpartition(",")[0] for row in rows)).index(trained)
            colour, marker = pictures.MARKS[number % len(pictures.MARKS)]
            ax.plot(*zip(*own, strict=True), label=name, color=colour, marker=marker,
                    linestyle="--" if name.endswith("plain") else "-")  # fmt: skip
        ax.set_xlabel("share of all parameters (%)")
        ax.set_ylabel("held-out loss (nats per token)")
        ax.legend()
        return figure


def main() -> int:
    """Measure all runs and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--out", type=Path, default=Path("runs/prefixes"))
    parser.add_argument("--windows", type=int, default=16, help="calibration windows for the moments")
    parser.add_argument("--picture", type=Path, help="FILE.png and FILE.svg")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "prefixes.json")
    options = parser.parse_args()
    runs = {name: Path(path) for name, _, path in (one.partition("=") for one in options.runs)}
    first = next(iter(runs.values()))
    config = CompressConfig.from_dict(json.loads((first / "manifest.json").read_text())["config"])
    loaded = load_configured(config)
    model, family = loaded.model, family_of(loaded.model.config)
    positions = model.config.max_position_embeddings
    held_out = windows_of(config.train, loaded.tokenizer, positions, config.seed)[1]
    assert held_out is not None, "train.holdout is 0: nothing to measure on"
    calibration = load_file(first / "tokens.safetensors")["calibration"][: options.windows]
    whole = full(model.config)
    subs = networks(first, costs.layout(model, family), whole)
    sort(model, family, load_file(first / "importance.safetensors"))
    rows = rows_of("before training", model, calibration, held_out.ids, subs, options.out / "before")
    for name, run in runs.items():
        trained = load(str(run / "supernet"), dtype=config.dtype).model
        rows += rows_of(f"trained {name}", trained, calibration, held_out.ids, subs, options.out / name)
    view = {
        "title": "share of all parameters", "index": "weights", "across": "kept_all", "across_format": ".0%",
        "value": "nats", "format": ".3f", "best": "min",
        "note": f"Cross entropy, nats per token, of {held_out.ids.numel()} held-out tokens of the training text.",
    }  # fmt: skip
    record.write(options.results, rows, {"main": view})
    if options.picture:
        pictures.save(picture(rows), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
