"""Ablations that the two papers show, on our model and with our method: benchmarks/results/papers.json.

    python benchmarks/papers.py samples --out runs/papers --text wiki.test.raw --calibration wiki.train.raw
    python benchmarks/papers.py parts --out runs/papers --text wiki.test.raw --calibration wiki.train.raw
    python benchmarks/papers.py start --out runs/papers --text wiki.test.raw --calibration wiki.train.raw

`samples`: how many calibration windows reformation needs, none at all among them (Shen et al. 2024, arXiv:2409.17372,
figure 6: 0, 128, 512, 1024); orders and curves are of the same windows. `parts`: attention alone, MLP alone, both
(figures 4 and 5). Both: orders, error curves and knapsack as always, without evolution, measured levels and sequential
pass. `start`: their evolution from masks of the most important units and from random masks, with the same candidates.
A row is a run of its own; resumable by row. Each part keeps the rows of the others that the results file holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import record

from prunus.baselines import shen_search
from prunus.baselines.subject import Subject
from prunus.config import resolve
from prunus.evaluation import perplexity, text_ids
from prunus.machine import environment, words
from prunus.models.families import dims
from prunus.models.loading import load
from prunus.pipeline import compress
from prunus.progress import LineProgress
from prunus.texts.calibration import calibration_tokens

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


def runs(options: argparse.Namespace, rows: list[dict[str, Any]], done: Path) -> None:
    """Rows of `samples` and `parts` that are not there yet: each a run of ours."""
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


def starts(options: argparse.Namespace, rows: list[dict[str, Any]], done: Path) -> None:
    """Rows of `start` that are not there yet: each an evolution of Shen et al.'s."""
    loaded = load(options.model, dtype="bfloat16")
    ids = calibration_tokens(
        options.calibration, loaded.tokenizer, samples=int(options.samples), length=int(options.length), seed=0
    )
    test = text_ids(options.text, loaded.tokenizer)
    subject = Subject(loaded.model, ids, search_tokens=options.search_tokens)
    for keep in map(float, options.keep.split(",")):
        for start in get_args(shen_search.Start):
            title = {"importance": "most important units first", "random": "random masks"}[start]
            if any(row["setting"] == title and row["kept"] == keep for row in rows):
                continue
            outcome, spent = subject.run(lambda k=keep, s=start: shen_search.compress(subject, k, start=s))  # type: ignore[misc]
            score = perplexity(outcome.model, test, length=int(options.test_length), chunks=5)
            rows.append(
                {
                    "part": "start", "setting": title, "kept": keep, "perplexity": score.ppl, "note": outcome.notes[0],
                    "seconds": spent.seconds, "forward_tokens": spent.forward_tokens,
                }
            )  # fmt: skip
            done.parent.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(rows))
            print(rows[-1], flush=True)


def main() -> int:
    """Run every row that is not there, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["samples", "parts", "start"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", required=True, help="the test text")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--length", default="512", help="tokens in a calibration window")
    parser.add_argument("--samples", default="64", help="windows, for `parts`")
    parser.add_argument("--test-length", default="2048", help="tokens in a test window, of which there are 5")
    parser.add_argument("--keep", default="0.9,0.8")
    parser.add_argument("--search-tokens", type=int, default=100_000, help="of each evolution, for `start`")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "papers.json")
    options = parser.parse_args()
    done = options.out / f"{options.part}.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text()) if done.exists() else []
    if options.part == "start":
        starts(options, rows, done)
    else:
        runs(options, rows, done)
    write(options, rows)
    return 0


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The results file, as benchmarks/render.py reads it; other parts keep their commands, machines and views."""
    empty: dict[str, Any] = {"rows": [], "commands": {}, "views": {}}
    old = json.loads(options.results.read_text()) if options.results.exists() else empty
    commands = {**old["commands"], options.part: record.typed()}
    theirs = {key: old[key] for key in ("machine", "versions") if key in old}
    origins = old.get("origins", dict.fromkeys(old["commands"], theirs))
    origins = {**origins, options.part: {"machine": words(), "versions": environment()}}
    pivot = {"title": "kept of the blocks", "index": "setting", "across": "kept", "across_format": ".0%", "best": "min"}
    kl = f"KL to the dense model on held-out windows of {options.length} tokens, nats."
    perplexity = f"Perplexity, first 5 windows of {options.test_length} tokens."
    own = {**pivot, "where": {"part": options.part}, "value": "perplexity", "format": ".2f", "note": perplexity}
    views = {**old["views"], options.part: own}
    if options.part == "parts":  # `samples` calibrates on other windows in every row, so other ones are held out
        views["parts-kl"] = {**pivot, "where": {"part": "parts"}, "value": "kl_nats", "format": ".4f", "note": kl}
    kept = [row for row in old["rows"] if row["part"] != options.part]
    record.write(
        options.results, [*kept, *rows], views, command="; ".join(commands.values()), commands=commands, origins=origins
    )


if __name__ == "__main__":
    sys.exit(main())
