"""What training costs, and what it makes of checkpoints: benchmarks/results/train.json.

    python benchmarks/train.py cost --model demo --train wiki.train.txt
    python benchmarks/train.py recover [NAME=]CHECKPOINT... --model demo --text wiki.test.raw --tasks piqa,boolq

`cost`: tokens a second, seconds of a sandwich step against a plain one and against its FLOPs, sub-networks reformed as
they are in a run (`--plain`: prefixes). `recover`: perplexities and task accuracies of checkpoints, trained or not: by
`prunus recover`, or in a super-network. Every part keeps the rows of the others that the results file holds. How
sub-networks are drawn is the matter of benchmarks/samplers.py.
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

import record
from torch.utils.flop_counter import FlopCounterMode

from prunus.evaluation import perplexity, text_ids
from prunus.models import costs
from prunus.models.families import Family, family_of, full
from prunus.models.loading import load
from prunus.models.slicing import sort
from prunus.models.stream import LayerStream
from prunus.reforming.levels import Levels, save_grams, unsorted
from prunus.scoring import importance, moments
from prunus.searching.grids import grid_of
from prunus.subnetwork import SubNetwork
from prunus.texts.instructions import training_windows
from prunus.training import adapters
from prunus.training.learning import TrainConfig
from prunus.training.loop import Job, fit
from prunus.training.nested import Nested

MOMENTS = 32  # windows that second moments are taken of


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
    ids = bench.windows.ids[:MOMENTS].to(next(model.parameters()).device)
    moments.collect(LayerStream(model, family), ids, lambda i, found: save_grams(found, folder, i))
    return Levels(model, family, folder, orders=unsorted(model))


def spent(job: Job) -> None:
    """Train, and keep no state of it: one of all weights is 1.6 GB for SmolLM2-135M."""
    shutil.rmtree(job.out, ignore_errors=True)
    fit(job)
    shutil.rmtree(job.out, ignore_errors=True)


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


def views(tasks: list[str]) -> dict[str, Any]:
    """How benchmarks/render.py shows the rows."""
    return {
        "cost": {
            "where": {"part": "cost"},
            "columns": [
                ["step", "step", ""], ["networks", "networks", ",d"], ["seconds", "seconds", ".2f"],
                ["tokens_per_second", "tokens per second", ",.0f"], ["flops", "FLOPs", ".3g"],
            ],
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


def data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the model, its data and its training, which benchmarks/samplers.py has too."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--train", help="training data")
    parser.add_argument("--text", help="test text")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window of the test text")
    parser.add_argument("--tasks")
    parser.add_argument("--tasks-path")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--drawn", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--ce", type=float, default=0.5)
    parser.add_argument("--kd", type=float, default=0.5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cost", "recover"])
    parser.add_argument("checkpoints", nargs="*", help="for `recover`")
    data_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/train"))
    parser.add_argument("--chunks", type=int, default=40, help="windows of the test text")
    parser.add_argument("--space", default="groups")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="`cost`: sub-networks are not reformed")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "train.json")
    return parser.parse_args()


def main() -> int:
    """Run one part and put its rows into the results file."""
    options = parsed()
    rows = recovered(options) if options.part == "recover" else cost(Bench(options), options.out)
    before = json.loads(options.results.read_text()) if options.results.exists() else {"rows": [], "commands": {}}
    commands = {**before.get("commands", {}), options.part: record.typed()}
    rows_of_all = [*(row for row in before["rows"] if row["part"] != options.part), *rows]
    last = next((row for row in reversed(rows_of_all) if row["part"] == "recover"), {})
    scored = [key for key in last if f"{key}_se" in last and key != "mean"]
    record.write(options.results, rows_of_all, views(scored), command="; ".join(commands.values()), commands=commands)
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
