"""What each way of drawing sub-networks is worth to a super-network: benchmarks/results/samplers.json.

    python benchmarks/samplers.py NAME --model demo --train rows.jsonl --text wiki.test.raw --steps 200

The ablation of Sukthanker et al. 2024 (arXiv:2410.06479v1, figure 3): the same steps for every way of drawing,
perplexity (and task accuracies) of the same networks of several sizes, the untrained super-network beside it. Ways that
are called `reformed-...` train sub-networks that are reformed, as `prunus compress --train` does, and need a space that
keeps the hidden size (`--space groups`); the others train plain prefixes, as the paper does. NAME is that of the
experiment: its rows replace those that it had, those of other experiments stay. Resumable by way.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import record
import torch
from matplotlib.figure import Figure
from train import Bench, data_flags, moments_of

from prunus.evaluation import perplexity, text_ids
from prunus.machine import environment, words
from prunus.models import costs
from prunus.models.families import full
from prunus.models.slicing import activate
from prunus.models.stream import LayerStream
from prunus.recording import pictures
from prunus.searching.grids import grid_of
from prunus.searching.objective import Divergence
from prunus.subnetwork import SubNetwork
from prunus.training import adapters, draws
from prunus.training.loop import fit
from prunus.training.nested import Nested

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)  # of all parameters: the sizes at which every way is scored


class Way(NamedTuple):
    """How sub-networks are drawn, and of which super-network."""

    ordered: bool  # sorted by importance
    reformed: bool
    strategy: draws.Strategy = "sandwich"
    sampler: draws.Sampler | None = None  # None: nothing is trained


WAYS = {
    "untrained": Way(False, False),
    "standard": Way(False, False, "standard", "random"),
    "random": Way(False, False, sampler="random"),
    "grid-params": Way(False, False, sampler="grid-params"),
    "calibrate": Way(False, False, sampler="calibrated-magnitude"),
    "untrained, sorted": Way(True, False),
    "importance-random": Way(True, False, sampler="random"),
    "importance-grid-params": Way(True, False, sampler="grid-params"),
    "importance-calibrate": Way(True, False, sampler="calibrated-magnitude"),
    "importance-calibrate-ppl": Way(True, False, sampler="calibrated-ppl"),
    "untrained, reformed": Way(True, True),
    "reformed-standard": Way(True, True, "standard", "random"),
    "reformed-random": Way(True, True, sampler="random"),
    "reformed-grid-params": Way(True, True, sampler="grid-params"),
    "reformed-calibrate": Way(True, True, sampler="calibrated-magnitude"),
    "reformed-calibrate-kl": Way(True, True, sampler="calibrated-kl"),
}


def run(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Every way of drawing: one row for each size."""
    o = bench.options
    cache = folder / "samplers.json"
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[dict[str, Any]]] = json.loads(cache.read_text()) if cache.exists() else {}
    for name in (name for name in WAYS if name in o.ways and name not in done):
        way = WAYS[name]
        model, family, layers = bench.fresh(way.ordered)
        space = grid_of(model.config, o.space, layer_order=layers)
        layout, whole = costs.layout(model, family), full(model.config)

        def size(sub: SubNetwork, layout: Any = layout) -> float:
            return float(costs.parameters(layout, sub, "all"))

        if way.reformed and len(space.hidden) > 1:
            raise SystemExit(f"{name} needs a space that keeps the hidden size: --space groups")
        scored = sized(space, size)  # alike for all: one network of each size, in no way's pool
        seconds = trained(bench, model, family, space, size, name, folder) if way.sampler else 0.0
        weights = moments_of(bench, model, family, folder / name) if way.reformed else None
        done[name] = [
            {"part": o.name, "way": name, "kept_all": size(sub) / size(whole), "share": share,
             "parameters": int(size(sub)), "seconds": seconds, "steps": o.steps if way.sampler else 0,
             **quality(bench, model, family, sub, weights)}
            for share, sub in scored.items()
        ]  # fmt: skip
        cache.write_text(json.dumps(done))
        print(name, f"{seconds:.0f} s", *(f"{row['ppl']:.2f}" for row in done[name]), flush=True)
    return [row for name in WAYS if name in o.ways for row in done[name]]


def trained(bench: Bench, model: Any, family: Any, space: Any, size: Any, name: str, folder: Path) -> float:
    """Train a super-network in one way (in place); returns the seconds, those of choosing its pool included."""
    o, way = bench.options, WAYS[name]
    start = time.perf_counter()
    levels = moments_of(bench, model, family, folder / name) if way.reformed else None
    device = next(model.parameters()).device

    def ppl(sub: SubNetwork) -> float:
        with activate(model, family, sub):
            return perplexity(model, bench.windows.ids[-4:].flatten(), length=o.window, bos=False).nats

    score: draws.Score = draws.magnitude(model, family) if way.sampler == "calibrated-magnitude" else ppl
    if way.sampler == "calibrated-kl":
        assert levels is not None
        kl = Divergence(LayerStream(model, family), bench.windows.ids[-4:].to(device), levels, windows=(4,))
        score = lambda sub: sum(kl.measure([sub], range(4))[0])  # noqa: E731
    assert way.sampler is not None
    least = o.least * size(space.largest())
    pool = draws.pool_of(space, size, way.sampler, bins=o.bins, draws=o.draws, seed=0, least=least, score=score)
    drawn = {"uniform draws": draws.histogram(space, size, None)}
    drawn |= {way.sampler: draws.histogram(space, size, pool)} if pool.networks else {}
    pictures.save(pictures.sizes(drawn, size(space.smallest()), size(space.largest())), folder / f"{name}-sizes")
    job = bench.job(model, family, draws.draw_of(space, pool, way.strategy, o.drawn), folder / f"{name}-training")
    job.weights = Nested(model, family, levels) if levels else None
    fit(job)
    adapters.merge(model)
    shutil.rmtree(folder / f"{name}-training", ignore_errors=True)
    return time.perf_counter() - start


def sized(space: Any, size: Any) -> dict[float, SubNetwork]:
    """A network for each share of all parameters: the nearest of many random ones."""
    rng = random.Random("scored")
    some = [space.largest(), *(space.sample(rng) for _ in range(4000))]
    whole = size(space.largest())
    return {share: min(some, key=lambda sub: abs(size(sub) / whole - share)) for share in SHARES}


def quality(bench: Bench, model: Any, family: Any, sub: SubNetwork, weights: Any = None) -> dict[str, float]:
    """Perplexity on the test text, and task accuracies where tasks are named; weights: of reformed writers."""
    o = bench.options
    found: dict[str, Any] = {}
    model.to(getattr(torch, o.dtype))  # as it would be saved; training leaves float32
    with activate(model, family, sub, weights(sub) if weights else None):
        result = perplexity(model, text_ids(o.text, bench.loaded.tokenizer), length=o.length, chunks=o.chunks)
        found |= {"ppl": result.ppl, "nats": result.nats, "nats_se": result.se}
        if o.tasks:
            from prunus.tasks import asked_for, evaluate_tasks

            with torch.no_grad():
                scored = evaluate_tasks(
                    model, bench.loaded.tokenizer, asked_for(o.tasks.split(","), 0), path=o.tasks_path, limit=o.limit
                )
            for row in scored["tasks"]:
                found |= {row["task"]: row["value"], f"{row['task']}_se": row["se"]}
    return found


def picture(rows: list[dict[str, Any]], task: str | None) -> Figure:
    """Loss, and one task, against size: a colour for each way of drawing, dashed where nothing was sorted first."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    plain = {way: way.removeprefix("importance-").removesuffix(", sorted") for way in ways}
    colours = list(dict.fromkeys(plain.values()))
    marks = (*pictures.MARKS, (pictures.BLUE, "P"), (pictures.GREY, "X"))
    with mpl.rc_context(pictures.STYLE):
        shown = [("nats", "cross entropy on the test text (nats per token)")]
        shown += [(task, f"accuracy, {task}")] if task else []
        figure = Figure(figsize=(6.2 * len(shown), 4.8), layout="constrained")
        for ax, (key, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for way, name in plain.items():
                own = [(row["parameters"] / 1e6, row[key], row[f"{key}_se"]) for row in rows if row["way"] == way]
                x, y, se = zip(*own, strict=True)
                colour, marker = marks[colours.index(name) % len(marks)]
                line = "-" if WAYS[way].ordered else "--"
                ax.errorbar(x, y, se, label=way, color=colour, marker=marker, linestyle=line)
            ax.set_xlabel("all parameters (millions)")
            ax.set_ylabel(label)
        figure.axes[0].legend(fontsize="small")
        return figure


def views(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A table of perplexities for every experiment, and one of every task that it has."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == name]
        common = {"title": "share of all parameters", "where": {"part": name}, "index": "way", "across": "share",
                  "across_format": ".0%", "format": ".2f"}  # fmt: skip
        note = "Perplexity; the same networks and the same steps in every row."
        found[name] = {**common, "value": "ppl", "best": "min", "note": note}
        for task in (key for key in own[0] if f"{key}_se" in own[0] and key != "nats"):
            scored = {"value": task, "error": f"{task}_se", "best": "max"}
            found[f"{name}-{task}"] = {**common, **scored, "note": f"Accuracy on {task}, ± its standard error."}
    return found


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of this experiment")
    data_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/samplers"))
    parser.add_argument("--chunks", type=int, default=5, help="windows of the test text")
    parser.add_argument("--space", default="llama_joint")
    parser.add_argument("--ways", nargs="+", default=[w for w in WAYS if "reformed" not in w], choices=list(WAYS))
    parser.add_argument("--bins", type=int, default=22)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--least", type=float, default=0.0, help="where the bins begin, a share of all parameters")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "samplers.json")
    return parser.parse_args()


def main() -> int:
    """Run one experiment and put its rows into the results file."""
    options = parsed()
    rows = run(Bench(options), options.out)
    empty: dict[str, Any] = {"rows": [], "commands": {}, "origins": {}}
    before = json.loads(options.results.read_text()) if options.results.exists() else empty
    commands = {**before["commands"], options.name: record.typed()}
    origins = {**before["origins"], options.name: {"machine": words(), "versions": environment()}}
    rows_of_all = [*(row for row in before["rows"] if row["part"] != options.name), *rows]
    task = next((key for key in rows[0] if f"{key}_se" in rows[0] and key != "nats"), None)
    pictures.save(picture(rows, task), options.out / "samplers")
    record.write(
        options.results,
        rows_of_all,
        views(rows_of_all),
        command="; ".join(commands.values()),
        commands=commands,
        origins=origins,
    )
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
