"""Compress, then quantise: size, speed and perplexity of GGUF files in llama.cpp: benchmarks/results/quantise.json.

    python benchmarks/quantise.py --out runs/quantise --text wiki.test.raw dense=demo keep-0.7=RUN/models/keep-0.7

Every network is exported in every type. Files and perplexities that are there are not made again (`--out` keeps them),
so that a run that was stopped goes on; speeds are taken at the end, in one sitting: rounds of one prompt and one
generation of every file (A B C ... C B A ...), so that a busy machine disturbs all alike. Figures are medians over
rounds, and ratios are taken within a round. Perplexity is the protocol of `prunus evaluate`, by llama.cpp; `torch` is
that of the checkpoint itself in float32. `--plan` says what would be done and about how long it takes, by one file
here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import record
from llama_cpp import Llama
from matplotlib.ticker import MultipleLocator, NullLocator

from prunus.evaluation import perplexity, text_ids
from prunus.exporting.export import export
from prunus.machine import environment
from prunus.models.loading import load
from prunus.recording.pictures import Figure, save


def opened(path: str, n: int, threads: int, *, every_logit: bool = False) -> Llama:
    """A file in llama.cpp, with room for n tokens."""
    return Llama(
        path, n_ctx=n, n_batch=n, n_ubatch=min(n, 512), n_threads=threads, n_threads_batch=threads,
        logits_all=every_logit, verbose=False,
    )  # fmt: skip


def nats(path: str, ids: np.ndarray[Any, Any], threads: int) -> float:
    """Mean negative log-likelihood of chunks (chunks, length): all tokens but the first of each are predicted."""
    model = opened(path, ids.shape[1], threads, every_logit=True)
    total = []
    for chunk in ids:
        model.reset()
        model.eval(chunk.tolist())
        logits = model.scores[: len(chunk) - 1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total.append(-float(np.take_along_axis(log_p, chunk[1:, None], 1).mean()))
    return statistics.fmean(total)


def kept(book: Path, path: Path, chunks: np.ndarray[Any, Any], compute: Callable[[], float]) -> float:
    """exp of what `compute` says of a file on these tokens, from the book where it was taken before."""
    stamp = path.stat() if path.is_file() else None
    what = f"{path} {stamp and (stamp.st_size, stamp.st_mtime_ns)}".encode() + chunks.tobytes()
    key = f"{path.name} {hashlib.sha256(what).hexdigest()[:16]}"
    known: dict[str, float] = json.loads(book.read_text()) if book.is_file() else {}
    if key not in known:
        known[key] = compute()
        book.write_text(json.dumps(known, indent=1) + "\n")
    return math.exp(known[key])


def rates(model: Llama, prompt: list[int], generate: int) -> tuple[float, float]:
    """Tokens per second of reading a prompt, and of tokens one at a time after it."""
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    read = time.perf_counter()
    for token in prompt[:generate]:
        model.eval([token])
    return len(prompt) / (read - start), generate / (time.perf_counter() - read)


def speeds(paths: list[str], options: argparse.Namespace, prompt: list[int]) -> list[list[tuple[float, float]]]:
    """`rates` of every file in every round, by file."""
    models = [opened(path, len(prompt) + options.generate, options.threads) for path in paths]
    for model in models:
        rates(model, prompt, 4)  # the first run of each is not counted
    found: list[list[tuple[float, float]]] = [[] for _ in paths]
    for turn in range(options.rounds):
        order = range(len(models)) if turn % 2 == 0 else reversed(range(len(models)))
        for i in order:
            found[i].append(rates(models[i], prompt, options.generate))
    return found


def measured(networks: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every network in every type."""
    rows: list[dict[str, Any]] = []
    prompt: list[int] = []
    options.out.mkdir(parents=True, exist_ok=True)
    book = options.out / "perplexity.json"
    for name, checkpoint in networks.items():
        loaded = load(checkpoint, dtype="float32", compress=False)
        ids = text_ids(options.text, loaded.tokenizer)
        chunks = ids[: options.chunks * options.length].view(options.chunks, options.length).numpy()
        source = Path(checkpoint) / "model.safetensors"
        torch_ppl = kept(
            book,
            source if source.is_file() else options.out / name,
            chunks,
            lambda model=loaded.model, ids=ids: math.log(
                perplexity(model, ids, length=options.length, chunks=options.chunks).ppl
            ),
        )
        prompt = chunks.flatten()[: options.prompt].tolist()
        parameters = sum(p.numel() for p in loaded.model.parameters())
        del loaded
        for quant in options.quants:
            path = options.out / f"{name}-{quant}.gguf"
            if not path.exists():
                export(checkpoint, quant=quant, out=path)
            row = {"network": name, "quant": quant, "path": str(path), "parameters": parameters, "torch": torch_ppl}
            ppl = kept(book, path, chunks, partial(nats, str(path), chunks, options.threads))
            rows.append(row | {"mb": path.stat().st_size / 1e6, "ppl": ppl, "to_torch": ppl / torch_ppl - 1})
            print(f"{name} {quant}: {rows[-1]['mb']:.1f} MB, perplexity {ppl:.3f}", flush=True)
    print(f"speeds of {len(rows)} files in {options.rounds} rounds", flush=True)
    found = speeds([row["path"] for row in rows], options, prompt)
    for row, own in zip(rows, found, strict=True):
        row |= {"pp": statistics.median(a for a, _ in own), "tg": statistics.median(b for _, b in own)}
        for k, key in enumerate(("pp_ratio", "tg_ratio")):
            row[key] = statistics.median(a[k] / b[k] for a, b in zip(own, found[0], strict=True))
        del row["path"]
    return rows


def planned(networks: dict[str, str], options: argparse.Namespace) -> str:
    """What a run would do, and its time by one file: the first that is there, or that is made for this."""
    files = [options.out / f"{name}-{quant}.gguf" for name in networks for quant in options.quants]
    there = [path for path in files if path.exists()]
    lines = [f"{len(files)} files of {len(networks)} networks, {len(there)} of them there already"]
    start = time.perf_counter()
    if there:
        path, made = there[0], 0.0
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        path = files[0]
        export(next(iter(networks.values())), quant=options.quants[0], out=path)
        made = time.perf_counter() - start
        lines.append(f"an export, with its comparison: {made:.0f} s")
    model = opened(str(path), options.prompt + options.generate, options.threads)
    prompt = [100 + k for k in range(options.prompt)]
    read, written = rates(model, prompt, options.generate)
    one = options.prompt / read + options.generate / written
    text = options.chunks * options.length / read * 1.5  # logits of every token are more work
    speeds_s, texts_s = len(files) * (options.rounds + 1) * one, len(files) * text
    exports_s = (len(files) - len(there) - bool(made)) * (made or 40.0)
    total = exports_s + texts_s + speeds_s + len(networks) * text * 2
    lines.append(f"{path.name}: {read:.0f} tokens/s read, {written:.1f} written")
    lines.append(
        f"about {total / 60:.0f} min: exports {exports_s / 60:.0f}, perplexities {texts_s / 60:.0f} (and of the "
        f"checkpoints in PyTorch), speeds {speeds_s / 60:.0f}"
    )
    arguments = [a for a in sys.argv[1:] if a != "--plan"]
    return "\n".join([*lines, shlex.join(["python", "benchmarks/quantise.py", *arguments])])


def picture(rows: list[dict[str, Any]], stem: Path) -> None:
    """Perplexity against size: a line for each type, a point for each network, hollow for names that end in trained."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for quant in dict.fromkeys(row["quant"] for row in rows):
        own = sorted((row for row in rows if row["quant"] == quant), key=lambda row: -row["mb"])
        line, apart = ([row for row in own if row["network"].endswith("trained") == t] for t in (False, True))
        (drawn,) = axes.plot([row["mb"] for row in line], [row["ppl"] for row in line], marker="o", label=quant)
        axes.plot([row["mb"] for row in apart], [row["ppl"] for row in apart], "o", mfc="none", color=drawn.get_color())
        for row in own:
            axes.annotate(
                row["network"], (row["mb"], row["ppl"]), xytext=(5, 3), textcoords="offset points", fontsize=7
            )
    axes.set(xlabel="file, MB", ylabel="perplexity", xscale="log", yscale="log", title="Compress, then quantise")
    axes.margins(x=0.12)
    for axis, step in ((axes.xaxis, 25), (axes.yaxis, 5)):
        axis.set_major_locator(MultipleLocator(step))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    save(figure, stem)


def views(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """How benchmarks/render.py shows the rows."""
    first = rows[0]
    columns = [
        ["network", "network", ""], ["quant", "matrices", ""], ["mb", "file, MB", ".1f"], ["ppl", "perplexity", ".2f"],
        ["to_torch", "to PyTorch", "+.2%"], ["pp", "prompt, tokens/s", ".0f"], ["pp_ratio", "ratio", ".2f"],
        ["tg", "generation, tokens/s", ".1f"], ["tg_ratio", "ratio", ".2f"],
    ]  # fmt: skip
    note = (
        f"Perplexity: {options.chunks} windows of {options.length} tokens of {Path(options.text).name}. Speed: "
        f"{options.prompt} tokens of prompt, then {options.generate} one at a time, {options.threads} thread(s), "
        f"medians of {options.rounds} rounds; ratios within a round, to {first['network']} in {first['quant']}."
    )
    return {"main": {"columns": columns, "note": note}}


def main() -> int:
    """Export, measure, write the results file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NAME=CHECKPOINT", help="the dense model first")
    parser.add_argument("--out", type=Path, required=True, help="directory of the GGUF files")
    parser.add_argument("--text", required=True, help="the test text")
    parser.add_argument("--quants", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="only say what would be done, and about how long it takes")
    here = Path(__file__).parent
    parser.add_argument("--results", type=Path, default=here / "results" / "quantise.json")
    parser.add_argument("--picture", type=Path, default=here.parent / "docs" / "pictures" / "quantise")
    options = parser.parse_args()
    pairs = dict(item.split("=", 1) for item in options.networks)
    if options.plan:
        print(planned(pairs, options))
        return 0
    rows = measured(pairs, options)
    versions = {**environment(), "llama-cpp-python": version("llama-cpp-python")}
    record.write(options.results, rows, views(rows, options), versions=versions)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    picture(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
