"""Compress, then quantise: size, speed and perplexity of GGUF files in llama.cpp: benchmarks/results/quantise.json.

    python benchmarks/quantise.py --out runs/quantise --text wiki.test.raw dense=demo keep-0.7=RUN/models/keep-0.7

Every network is exported in every type, and files that are there are not made again. Speed is taken in rounds, one
prompt and one generation of every file in each (A B C ... C B A ...), so that a busy machine disturbs all alike;
figures are medians over rounds, and ratios are taken within a round. Perplexity is the protocol of `prunus evaluate`,
by llama.cpp; `torch` is that of the checkpoint itself in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama

from prunus.evaluation import perplexity, text_ids
from prunus.export import export
from prunus.loading import load
from prunus.machine import environment, words
from prunus.pictures import Figure, save


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
    for name, checkpoint in networks.items():
        loaded = load(checkpoint, dtype="float32", compress=False)
        ids = text_ids(options.text, loaded.tokenizer)
        chunks = ids[: options.chunks * options.length].view(options.chunks, options.length).numpy()
        torch_ppl = perplexity(loaded.model, ids, length=options.length, chunks=options.chunks).ppl
        prompt = chunks.flatten()[: options.prompt].tolist()
        parameters = sum(p.numel() for p in loaded.model.parameters())
        del loaded
        for quant in options.quants:
            path = options.out / f"{name}-{quant}.gguf"
            if not path.exists():
                export(checkpoint, quant=quant, out=path)
            row = {"network": name, "quant": quant, "path": str(path), "parameters": parameters, "torch": torch_ppl}
            ppl = math.exp(nats(str(path), chunks, options.threads))
            rows.append(row | {"mb": path.stat().st_size / 1e6, "ppl": ppl, "to_torch": ppl / torch_ppl - 1})
    found = speeds([row["path"] for row in rows], options, prompt)
    for row, own in zip(rows, found, strict=True):
        row |= {"pp": statistics.median(a for a, _ in own), "tg": statistics.median(b for _, b in own)}
        for k, key in enumerate(("pp_ratio", "tg_ratio")):
            row[key] = statistics.median(a[k] / b[k] for a, b in zip(own, found[0], strict=True))
        del row["path"]
    return rows


def picture(rows: list[dict[str, Any]], stem: Path) -> None:
    """Perplexity against size: a line for each type, a point for each network."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for quant in dict.fromkeys(row["quant"] for row in rows):
        own = sorted((row for row in rows if row["quant"] == quant), key=lambda row: -row["mb"])
        axes.plot([row["mb"] for row in own], [row["ppl"] for row in own], marker="o", label=quant)
        for row in own:
            axes.annotate(
                row["network"], (row["mb"], row["ppl"]), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    axes.set(xlabel="file, MB", ylabel="perplexity", xscale="log", yscale="log", title="Compress, then quantise")
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
    here = Path(__file__).parent
    parser.add_argument("--results", type=Path, default=here / "results" / "quantise.json")
    parser.add_argument("--picture", type=Path, default=here.parent / "docs" / "pictures" / "quantise")
    options = parser.parse_args()
    rows = measured(dict(item.split("=", 1) for item in options.networks), options)
    command = shlex.join(["python", "benchmarks/quantise.py", *(re.sub(r"[^=;\s]*/", "", a) for a in sys.argv[1:])])
    results = {
        "command": command,
        "machine": words(),
        "versions": {**environment(), "llama-cpp-python": version("llama-cpp-python")},
        "rows": rows,
        "views": views(rows, options),
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    picture(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
