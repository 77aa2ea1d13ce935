"""The part of agree_llmcompressor.py that runs in llm-compressor's own environment: one modifier on given tokens.

    python benchmarks/peers/run_llmcompressor.py MODEL TOKENS OUT --modifier sparsegpt --structure 2:4

MODEL: a directory. TOKENS: a safetensors file with `ids` (windows, length). OUT: a safetensors file of the decoder
blocks' matrices, with the versions in its metadata. Everything but sparsity and structure is llm-compressor's default.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main() -> int:
    """Prune, and write the matrices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--modifier", choices=MODIFIERS, required=True)
    parser.add_argument("--structure", default="0:0")
    parser.add_argument("--sparsity", type=float, default=0.5)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = load_file(options.tokens)["ids"]
    windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    modifier = MODIFIERS[options.modifier](
        sparsity=options.sparsity, mask_structure=options.structure, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    start = time.monotonic()
    oneshot(model=model, dataset=DataLoader(windows, batch_size=None), recipe=[modifier])
    told = {
        "llmcompressor": version("llmcompressor"), "transformers": version("transformers"), "torch": version("torch"),
        "seconds": f"{time.monotonic() - start:.1f}",
    }  # fmt: skip
    matrices = {
        name: p.detach().contiguous() for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name
    }
    save_file(matrices, options.out, metadata=told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
