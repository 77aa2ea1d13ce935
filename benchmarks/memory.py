"""Peak memory of compressing a large random model, against its own bytes: benchmarks/results/memory.json.

    python benchmarks/memory.py --out runs/memory --tokenizer MODEL

Makes a Llama of the shapes of Llama-3.2-1B (--shape: or smaller) with random weights in bfloat16 (quality means
nothing, sizes everything), and runs score, reform, search without generations, sequential pass and extraction on it in
a process of its own. Beside each step's peak stands what `prunus check` had estimated for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import record
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from prunus.config import CompressConfig, flatten
from prunus.models.loading import load
from prunus.models.memory import Work, memory_need, memory_needs
from prunus.models.precision import computing

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "small": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16},
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
}


def make(directory: Path, shape: str, tokenizer: str) -> None:
    """Write the random model, unless it is there."""
    if not (directory / "config.json").exists():
        torch.manual_seed(0)
        loaded = load(tokenizer, dtype="bfloat16")
        config = LlamaConfig(
            **SHAPES[shape], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, head_dim=None
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        loaded.tokenizer.save_pretrained(directory)


def main() -> int:
    """Make the model, run, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", default="demo", help="a model whose tokenizer is borrowed")
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--text", default="generated", help="calibration source")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    make(options.out / "model", options.shape, options.tokenizer)
    run = options.out / "run"
    small = ["--samples", "8", "--length", "512", "--generations", "0", "--keep", "0.8", "--calibration", options.text]
    less = ["calibration.holdout=4", "reform.block=256", "reform.fisher=2"]
    command = [sys.executable, "-m", "prunus", "compress", str(options.out / "model"), "--out", str(run), *small]
    command += [part for item in less for part in ("--set", item)]
    subprocess.run(command, check=True)
    manifest = json.loads((run / "manifest.json").read_text())
    artefacts, config = manifest["artefacts"], AutoConfig.from_pretrained(options.out / "model")
    dtype = computing(torch.bfloat16, "cpu")
    n_bytes = memory_need(config, dtype)
    needs = memory_needs(config, dtype, Work.of(CompressConfig.from_dict(flatten(manifest["config"]))))
    loaded = artefacts["tokens.safetensors"]["peak_bytes"]  # nothing but the model is there by then
    rows = [
        {
            "step": entry["step"],
            "artefact": name,
            "peak_gb": entry["peak_bytes"] / 1e9,
            "times": entry["peak_bytes"] / n_bytes,
            "beside_gb": (entry["peak_bytes"] - loaded) / 1e9,
            "estimate_gb": needs.get("evaluate" if name.startswith("models/") else entry["step"], 0) / 1e9,
            "allowed_gb": 2.2 * n_bytes / 1e9 + 3,
            "seconds": entry["seconds"],
        }
        for name, entry in artefacts.items()
    ]
    columns = [
        ["step", "step", ""],
        ["artefact", "artefact", ""],
        ["peak_gb", "peak, GB", ".2f"],
        ["times", "of the model's bytes", ".2f"],
        ["allowed_gb", "allowed, GB", ".2f"],
        ["beside_gb", "beside the loaded model, GB", ".2f"],
        ["estimate_gb", "estimate for the step, GB", ".2f"],
        ["seconds", "seconds", ".0f"],
    ]
    note = f"The model's weights are {n_bytes / 1e9:.2f} GB ({str(dtype).removeprefix('torch.')}, as the work is done)."
    views = {"main": {"columns": columns, "note": note}}
    record.write(options.results, rows, views, model_gb=n_bytes / 1e9)
    return 0


if __name__ == "__main__":
    sys.exit(main())
