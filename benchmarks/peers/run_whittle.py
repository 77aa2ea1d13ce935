"""The part of agree_whittle.py that runs in whittle's own environment: sub-networks and importance scores.

    python benchmarks/peers/run_whittle.py MODEL ASKED OUT

MODEL: a directory that litgpt's converter reads, in a folder of its own (the converter writes into it). ASKED: a
safetensors file with `test` (windows, length) and `ids` (windows, length), and in its metadata `networks` (arguments of
set_sub_network, by name), `objectives` and `name` (litgpt's of the model). OUT: a safetensors file of logits and
scores, with the rest in its metadata.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from litgpt import Config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from whittle.importance.block_importance import compute_block_importance
from whittle.importance.embd_size import compute_importance_embd
from whittle.importance.intermediate_size import compute_importance_intermediate_size
from whittle.importance.num_heads import compute_importance_head_groups, compute_importance_heads
from whittle.metrics.parameters import compute_parameters
from whittle.models.gpt import GPT
from whittle.models.gpt.extract import extract_current_sub_network

SCORES = {
    "mlp": compute_importance_intermediate_size,
    "q_per_kv": compute_importance_heads,
    "kv_heads": compute_importance_head_groups,
    "hidden": compute_importance_embd,
}


class Given:
    """Stands for a tokenizer: whatever text it is given, its tokens are these windows."""

    pad_token = ""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.ids.reshape(1, -1))


def nats(model: GPT, test: Tensor) -> list[float]:
    """Mean negative log-likelihood of each window."""
    losses = []
    for row in test:
        logits = model(row[None])[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
    return losses


def network(model: GPT, asked: dict[str, Any], ids: Tensor, test: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Logits on ids, and figures, of one sub-network."""
    model.set_sub_network(**asked)
    logits = model(ids).float()
    found: dict[str, Any] = {"nats": nats(model, test), "parameters": int(compute_parameters(model))}
    try:
        small = extract_current_sub_network(model)
        apart = float((small.eval()(ids).float() - logits).abs().max())
        found |= {"extracted": sum(p.numel() for p in small.parameters()), "extracted_difference": apart}
    except Exception as error:  # a finding too
        found["extract_error"] = f"{type(error).__name__}: {error}"
    return logits, found


def scores(model: GPT, ids: Tensor, objectives: list[str], folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """whittle's importance of every unit, summed over the layers by it, and of every layer; and what failed."""
    Dataset.from_dict({"text": ["any"]}).save_to_disk(folder)
    batch = {"batch_size": len(ids), "num_batches": 1, "dataset_path": str(folder)}
    found, failed = {}, {}
    for unit, compute in SCORES.items():
        for objective in objectives:
            try:
                one = compute(ids.shape[1], objective, model, Given(ids), **batch)
                found[f"{unit} {objective}"] = torch.tensor([float(v) for v in one.values()], dtype=torch.float64)
            except Exception as error:
                failed[f"{unit} {objective}"] = f"{type(error).__name__}: {error}"
    one = compute_block_importance(ids.shape[1], model, Given(ids), **batch)
    found["blocks"] = torch.tensor([float(v) for v in one.values()], dtype=torch.float64)
    return found, failed


@torch.no_grad()
def main() -> int:
    """Convert, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("asked")
    parser.add_argument("out")
    options = parser.parse_args()
    with safe_open(options.asked, framework="pt") as file:
        ids, test, told = file.get_tensor("ids"), file.get_tensor("test"), file.metadata()
    with contextlib.redirect_stdout(sys.stderr):
        convert_hf_checkpoint(options.model, model_name=told["name"])
    config = Config.from_file(options.model / "model_config.yaml")
    model = GPT(config, compute_importance=True)
    model.load_state_dict(torch.load(options.model / "lit_model.pth"))
    model = model.float().eval()
    model.max_seq_length = max(ids.shape[1], test.shape[1])
    tensors, figures = {}, {}
    for name, asked in json.loads(told["networks"]).items():
        try:
            tensors[f"logits {name}"], figures[name] = network(model, asked, ids[:1], test)
        except Exception as error:
            figures[name] = {"error": f"{type(error).__name__}: {error}"}
    model.reset_super_network()
    with tempfile.TemporaryDirectory() as folder:
        found, failed = scores(model, ids, json.loads(told["objectives"]), Path(folder) / "text")
    versions = {name: version(name) for name in ("whittle", "litgpt", "transformers", "torch")}
    metadata = {"networks": json.dumps(figures), "failed": json.dumps(failed), "versions": json.dumps(versions)}
    save_file({k: v.contiguous() for k, v in (tensors | found).items()}, options.out, metadata=metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
