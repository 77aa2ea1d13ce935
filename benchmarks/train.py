"""What training costs, and what each way of drawing sub-networks is worth: benchmarks/results/train.json.

    python benchmarks/train.py cost --model demo --train wiki.train.txt
    python benchmarks/train.py samplers --model demo --train rows.jsonl --text wiki.test.raw --steps 200
    python benchmarks/train.py recover [NAME=]CHECKPOINT... --model demo --text wiki.test.raw --tasks piqa,boolq

`cost`: tokens a second, seconds of a sandwich step against a plain one and against its FLOPs, sub-networks reformed as
they are in a run (`--plain`: prefixes). `samplers`: the ablation
of Sukthanker et al. 2024 (arXiv:2410.06479v1, figure 3): the same steps for every way of drawing, perplexity of
networks of several sizes, the untrained super-network beside it. `recover`: perplexities and task accuracies of
checkpoints, trained or not: by `prunus recover`, or in a super-network. Every part keeps the rows of the others that
the results file holds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import record
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from prunus.evaluation import perplexity, text_ids
from prunus.models import costs
from prunus.models.families import Family, family_of, full
from prunus.models.loading import load
from prunus.models.slicing import activate, sort
from prunus.models.stream import LayerStream
from prunus.recording import pictures
from prunus.reforming.levels import Levels, save_grams, unsorted
from prunus.scoring import importance, moments
from prunus.searching.grids import grid_of
from prunus.subnetwork import SubNetwork
from prunus.texts.instructions import training_windows
from prunus.training import adapters, draws
from prunus.training.learning import TrainConfig
from prunus.training.loop import Job, fit
from prunus.training.nested import Nested

# name -> (sorted by importance, strategy, sampler)
WAYS: dict[str, tuple[bool, str, str]] = {
    "standard": (False, "standard", "random"),
    "random": (False, "sandwich", "random"),
    "grid-params": (False, "sandwich", "grid-params"),
    "calibrate": (False, "sandwich", "calibrated-magnitude"),
    "importance-random": (True, "sandwich", "random"),
    "importance-grid-params": (True, "sandwich", "grid-params"),
    "importance-calibrate": (True, "sandwich", "calibrated-magnitude"),
    "importance-calibrate-ppl": (True, "sandwich", "calibrated-ppl"),
}
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)  # of all parameters: the sizes at which every way is scored


class Bench:
    """A model, its data, and what is asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = TrainConfig(
            data=options.train, length=options.window, batch=options.batch, steps=options.steps, rank=options.rank,
            lr=options.lr, precision=options.precision, drawn=options.drawn, save_every=10**6, holdout=0,
            space=options.space, ce=options.ce, kd=options.kd, log_every=10,
        )  # fmt: skip
        self.loaded = load(options.model, dtype=options.dtype, device=options.device)
        self.windows = training_windows(options.train, self.loaded.tokenizer, length=options.window, seed=0)

    def fresh(self, ordered: bool) -> Any:
        """The model anew, sorted by the paper's importance (mean activations) or as it is, and the order of layers."""
        o = self.options
        model = load(o.model, dtype=o.dtype, device=o.device).model
        family = family_of(model.config)
        layers = None
        ids = self.windows.ids[:8].to(next(model.parameters()).device)
        if ordered:
            found = importance.score(model, family, ids, method="activation")
            layers = found.blocks.argsort(descending=True).tolist()
            sort(model, family, found.order())
        return model, family, layers

    def job(self, model: Any, family: Any, draw: Any, out: Path, **changes: Any) -> Job:
        config = TrainConfig(**{**vars(self.config), **changes})
        if config.rank:
            adapters.attach(model, family, rank=config.rank)
        else:
            model.float()
        return Job(model, family, self.windows, config, out, draw=draw)


def cost(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Seconds and FLOPs of a step: plain, and with the passes of a sandwich, each network's own step beside it."""
    model, family, _ = bench.fresh(True)
    space = grid_of(model.config, bench.options.space)
    rng = random.Random(0)
    subs = [space.sample(rng) for _ in range(bench.options.drawn)] + [space.smallest()]
    plans: dict[str, list[SubNetwork | None]] = {"full": [None]}
    plans |= {f"alone {k}": [sub] for k, sub in enumerate(subs)} | {"sandwich": [None, *subs]}
    layout, whole = costs.layout(model, family), full(model.config)
    share = [costs.parameters(layout, sub, "all") / costs.parameters(layout, whole, "all") for sub in subs]
    rows = []
    database = None if bench.options.plain else moments_of(bench, model, family, folder)
    if bench.config.rank == 0:
        model.float()
    else:
        adapters.attach(model, family, rank=bench.config.rank)
    weights = Nested(model, family, database) if database else None
    for name, plan in plans.items():
        steps = bench.options.repeats + 1
        seconds: list[float] = []
        last = [time.perf_counter()]

        def tick(_: int, seconds: list[float] = seconds, last: list[float] = last) -> None:
            now = time.perf_counter()
            seconds.append(now - last[0])
            last[0] = now

        config = TrainConfig(**{**vars(bench.config), "steps": steps})
        one = Job(
            model, family, bench.windows, config, folder / f"cost-{name.replace(' ', '-')}",
            draw=lambda _, plan=plan: plan, advance=tick, weights=weights,
        )  # fmt: skip
        spent(one)
        with FlopCounterMode(display=False) as counter:
            again = TrainConfig(**{**vars(config), "steps": 1})
            spent(
                Job(model, family, bench.windows, again, folder / f"flops-{name.replace(' ', '-')}",
                    draw=lambda _, plan=plan: plan, weights=weights)
            )  # fmt: skip
        tokens = config.batch * config.length
        rows.append(
            {
                "part": "cost", "step": name, "networks": len(plan), "rank": config.rank, "window": config.length,
                "batch": config.batch, "precision": config.precision, "seconds": statistics.median(seconds[1:]),
                "tokens_per_second": tokens / statistics.median(seconds[1:]), "flops": counter.get_total_flops(),
            }
        )  # fmt: skip
        if name.startswith("alone"):
            rows[-1]["kept_all"] = share[int(name.split()[1])]
    alone = [row for row in rows if row["step"] != "sandwich"]
    sandwich = rows[-1]
    for key in ("seconds", "flops"):
        sandwich[f"{key}_of_the_parts"] = sandwich[key] / sum(row[key] for row in alone)
    sandwich["plain_steps"] = sandwich["seconds"] / rows[0]["seconds"]
    return rows


def moments_of(bench: Bench, model: Any, family: Family, folder: Path) -> Levels:
    """Second moments of a few windows, for the reformed weights of a model that is sorted already."""
    folder = folder / "grams"
    folder.mkdir(parents=True, exist_ok=True)
    ids = bench.windows.ids[:8].to(next(model.parameters()).device)
    moments.collect(LayerStream(model, family), ids, lambda i, found: save_grams(found, folder, i))
    return Levels(model, family, folder, orders=unsorted(model))


def spent(job: Job) -> None:
    """Train, and keep no state of it: one of all weights is 1.6 GB for SmolLM2-135M."""
    shutil.rmtree(job.out, ignore_errors=True)
    fit(job)
    shutil.rmtree(job.out, ignore_errors=True)


def samplers(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Every way of drawing, the same steps: perplexity of one network of every size, and of the untrained one."""
    o, rows = bench.options, []
    cache = folder / "samplers.json"
    done: dict[str, list[dict[str, Any]]] = json.loads(cache.read_text()) if cache.exists() else {}
    for ordered in (False, True):
        ways = {n: w for n, w in WAYS.items() if w[0] == ordered and n in o.ways}
        name = "untrained, sorted" if ordered else "untrained"
        for way in (name, *ways):
            if way not in done:
                model, family, layers = bench.fresh(ordered)
                space = grid_of(model.config, o.space, layer_order=layers)
                layout = costs.layout(model, family)

                def size(sub: SubNetwork, layout: Any = layout) -> float:
                    return float(costs.parameters(layout, sub, "all"))

                # what is scored, is drawn alike for all: one network of each size, in no way's pool
                scored = sized(space, size)
                seconds = 0.0
                if way in ways:
                    seconds = trained(bench, model, family, space, size, way, folder)
                done[way] = [
                    {"part": "samplers", "way": way, "kept_all": size(sub) / size(full(model.config)), "share": share,
                     "parameters": int(size(sub)), "seconds": seconds, "steps": o.steps if way in ways else 0,
                     **quality(bench, model, family, sub)}
                    for share, sub in scored.items()
                ]  # fmt: skip
                folder.mkdir(parents=True, exist_ok=True)
                cache.write_text(json.dumps(done))
            rows += done[way]
    return rows


def trained(bench: Bench, model: Any, family: Any, space: Any, size: Any, way: str, folder: Path) -> float:
    """Train a super-network in one way (in place); returns the seconds, those of the calibration included."""
    _, strategy, sampler = WAYS[way]
    start = time.perf_counter()

    def ppl(sub: SubNetwork) -> float:
        with activate(model, family, sub):
            return perplexity(model, bench.windows.ids[-4:].flatten(), length=bench.options.window, bos=False).nats

    score = draws.magnitude(model, family) if sampler == "calibrated-magnitude" else ppl
    pool = draws.pool_of(
        space, size, sampler, bins=bench.options.bins, draws=bench.options.draws, seed=0, score=score  # type: ignore[arg-type]
    )  # fmt: skip
    drawn = {"uniform draws": draws.histogram(space, size, None)}
    drawn |= {sampler: draws.histogram(space, size, pool)} if pool.networks else {}
    pictures.save(pictures.sizes(drawn, size(space.smallest()), size(space.largest())), folder / f"{way}-sizes")
    draw = draws.draw_of(space, pool, strategy, bench.options.drawn)  # type: ignore[arg-type]
    fit(bench.job(model, family, draw, folder / way))
    adapters.merge(model)
    shutil.rmtree(folder / way, ignore_errors=True)
    return time.perf_counter() - start


def sized(space: Any, size: Any) -> dict[float, SubNetwork]:
    """A network for each share of all parameters: the nearest of many random ones."""
    rng = random.Random("scored")
    some = [space.largest(), *(space.sample(rng) for _ in range(4000))]
    whole = size(space.largest())
    return {share: min(some, key=lambda sub: abs(size(sub) / whole - share)) for share in SHARES}


def quality(bench: Bench, model: Any, family: Any, sub: SubNetwork) -> dict[str, float]:
    """Perplexity on the test text, and task accuracies where tasks are named."""
    o = bench.options
    found: dict[str, Any] = {}
    model.to(getattr(torch, o.dtype))  # as it would be saved; training leaves float32
    with activate(model, family, sub):
        if o.text:
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
    plain = [way.removeprefix("importance-").removesuffix(", sorted") for way in ways]
    with mpl.rc_context(pictures.STYLE):
        shown = [("nats", "cross entropy on the test text (nats per token)")]
        shown += [(task, f"accuracy, {task}")] if task else []
        figure = Figure(figsize=(6.2 * len(shown), 4.8), layout="constrained")
        for ax, (key, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for way, name in zip(ways, plain, strict=True):
                own = [(row["parameters"] / 1e6, row[key], row[f"{key}_se"]) for row in rows if row["way"] == way]
                x, y, se = zip(*own, strict=True)
                colour, marker = pictures.MARKS[list(dict.fromkeys(plain)).index(name) % len(pictures.MARKS)]
                ax.errorbar(x, y, se, label=way, color=colour, marker=marker, linestyle="--" if way == name else "-")
            ax.set_xlabel("all parameters (millions)")
            ax.set_ylabel(label)
        figure.axes[0].legend(fontsize="small")
        return figure


def recovered(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Perplexities and task accuracies of checkpoints, trained and not, beside the dense model's; resumable by row."""
    cache = options.out / "recover.json"
    done: dict[str, dict[str, Any]] = json.loads(cache.read_text()) if cache.exists() else {}
    rows: list[dict[str, Any]] = []
    for named in (options.model, *options.checkpoints):
        name, _, path = named.rpartition("=")
        file = Path(path) / "model.safetensors"
        key = f"{path} {file.stat().st_mtime_ns if file.is_file() else ''} {options.tasks} {options.limit}"
        if key not in done:
            done[key] = judged(options, path)
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(json.dumps(done, indent=1))
        excess = {
            name.replace("ppl", "excess"): math.log(value) - math.log(rows[0][name] if rows else value)
            for name, value in done[key].items()
            if name.startswith("ppl")
        }
        rows.append({**done[key], "checkpoint": name or Path(path).name, **excess})
    return rows


def judged(options: argparse.Namespace, path: str) -> dict[str, Any]:
    """One checkpoint: its perplexities (all windows, the first five), its task accuracies, what its training was."""
    loaded = load(path, dtype=options.dtype, compress=False, device=options.device)
    ids = text_ids(options.text, loaded.tokenizer)
    manifest = Path(path) / "prunus.json"
    origin = json.loads(manifest.read_text()) if manifest.is_file() else {}
    note = origin.get("recovery") or origin.get("train") or {}
    found = {
        "part": "recover", "checkpoint": Path(path).name, "trained": bool(note), "tokens": note.get("tokens", 0),
        "seconds": note.get("seconds", 0.0), "data": note.get("data"), "rank": note.get("settings", {}).get("rank"),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
    }  # fmt: skip
    for length, chunks in ((options.length, options.chunks), (128, 320)):
        result = perplexity(loaded.model, ids, length=length, chunks=chunks)
        found |= {f"ppl{length}": result.ppl, f"nats{length}_se": result.se}
        if length == options.length:
            found["ppl_first5"] = math.exp(statistics.fmean(result.per_chunk[:5]))
    if options.tasks:
        from prunus.tasks import asked_for, evaluate_tasks

        scored = evaluate_tasks(
            loaded.model, loaded.tokenizer, asked_for(options.tasks.split(","), 0), path=options.tasks_path,
            limit=options.limit,
        )  # fmt: skip
        for row in scored["tasks"]:
            found |= {row["task"]: row["value"], f"{row['task']}_se": row["se"]}
        found["mean"] = statistics.fmean(row["value"] for row in scored["tasks"])
        found["mean_se"] = math.sqrt(sum(row["se"] ** 2 for row in scored["tasks"])) / len(scored["tasks"])
    return found


def views(tasks: list[str], asked: dict[str, float]) -> dict[str, Any]:
    """How benchmarks/render.py shows the rows; asked: tasks of `samplers`, each with its largest standard error."""
    return {
        "cost": {
            "where": {"part": "cost"},
            "columns": [
                ["step", "step", ""], ["networks", "networks", ",d"], ["seconds", "seconds", ".2f"],
                ["tokens_per_second", "tokens per second", ",.0f"], ["flops", "FLOPs", ".3g"],
            ],
        },
        "samplers": {
            "title": "share of all parameters", "where": {"part": "samplers"}, "index": "way", "across": "share",
            "across_format": ".0%", "value": "ppl", "format": ".2f", "best": "min",
            "note": "Perplexity; the same networks and the same steps in every row.",
        },
        **{
            f"samplers-{task}": {
                "title": "share of all parameters", "where": {"part": "samplers"}, "index": "way", "across": "share",
                "across_format": ".0%", "value": task, "format": ".2f", "best": "max",
                "note": f"Accuracy on {task}, standard errors at most {worst:.2f}.",
            }
            for task, worst in asked.items()
        },
        "recover": {
            "where": {"part": "recover"},
            "columns": [
                ["checkpoint", "checkpoint", ""], ["parameters", "parameters", ",d"], ["tokens", "trained on", ",d"],
                ["seconds", "seconds", ",.0f"], ["ppl_first5", "perplexity, 5 x 2048", ".2f"],
                ["excess_first5", "excess, nats", ".4f"], ["ppl2048", "all windows", ".2f"],
                ["excess2048", "excess", ".4f"], ["ppl128", "320 x 128", ".2f"], ["mean", "tasks, mean", ".3f"],
                ["mean_se", "± s.e.", ".3f"],
            ],
        },
        "tasks": {
            "where": {"part": "recover"},
            "columns": [
                ["checkpoint", "checkpoint", ""],
                *(column for task in tasks for column in ([task, task, ".3f"], [f"{task}_se", "±", ".3f"])),
            ],
        },
    }  # fmt: skip


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cost", "samplers", "recover"])
    parser.add_argument("checkpoints", nargs="*", help="for `recover`")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=Path("runs/train"))
    parser.add_argument("--train", help="training data")
    parser.add_argument("--text", help="test text")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=5, help="windows of the test text; `recover` wants 40")
    parser.add_argument("--tasks")
    parser.add_argument("--tasks-path")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--space", default="llama_joint")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--drawn", type=int, default=2)
    parser.add_argument("--bins", type=int, default=22)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--ce", type=float, default=0.5)
    parser.add_argument("--kd", type=float, default=0.5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="`cost`: sub-networks are not reformed")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "train.json")
    return parser.parse_args()


def main() -> int:
    """Run one part and put its rows into the results file."""
    options = parsed()
    if options.part == "recover":
        rows = recovered(options)
    else:
        bench = Bench(options)
        rows = cost(bench, options.out) if options.part == "cost" else samplers(bench, options.out)
    before = json.loads(options.results.read_text()) if options.results.exists() else {"rows": [], "commands": {}}
    commands = {**before.get("commands", {}), options.part: record.typed()}
    rows_of_all = [*(row for row in before["rows"] if row["part"] != options.part), *rows]
    last = next((row for row in reversed(rows_of_all) if row["part"] == "recover"), {})
    scored = [key for key in last if f"{key}_se" in last and key != "mean"]
    drawn = [row for row in rows_of_all if row["part"] == "samplers"]
    asked = {key: max(row[f"{key}_se"] for row in drawn) for key in (drawn or [{}])[0] if f"{key}_se" in drawn[0]}
    asked.pop("nats", None)
    if options.part == "samplers":
        pictures.save(picture(drawn, next(iter(asked), None)), options.out / "samplers")
    record.write(
        options.results, rows_of_all, views(scored, asked), command="; ".join(commands.values()), commands=commands
    )
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
