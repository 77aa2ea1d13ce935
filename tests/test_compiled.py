"""Extracted checkpoints run as any other model does: compiled, partly on the disk, in bfloat16, with a static cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ragged, tiny, tokens
from transformers import AutoModelForCausalLM

from prunus.models.checkpoint import save
from prunus.models.families import dims, family_of
from prunus.models.slicing import extract
from prunus.subnetwork import LayerShape, SubNetwork

COMPILER = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
KINDS = ("uniform", "ragged")


def written(name: str, kind: str, directory: Path) -> tuple[Any, Path]:
    """A small model and its checkpoint."""
    model = tiny(name)
    d = dims(model.config)
    layer = LayerShape(d["kv_heads"], d["q_per_kv"], 40)
    sub = SubNetwork(48, (layer, layer, LayerShape(0, 0, 0), layer)) if kind == "uniform" else ragged(model.config)
    small: Any = extract(model, family_of(model.config), sub)
    save(small, None, directory / kind, card="a card", manifest={})
    return small, directory / kind


def loaded(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **options).eval()


@pytest.fixture(autouse=True)
def _forget() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@COMPILER
@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    """Seconds: a C++ compiler is at work for every new kernel."""
    model = loaded(written("llama", kind, tmp_path)[1])
    compiled: Any = torch.compile(model, fullgraph=True)
    x = tokens(2, 13)
    torch.testing.assert_close(
        compiled(input_ids=x, use_cache=False).logits, model(input_ids=x).logits, atol=1e-5, rtol=0
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "opt"])
def test_layers_of_different_widths_are_one_graph(name: str, tmp_path: Path) -> None:
    model = loaded(written(name, "ragged", tmp_path)[1])
    traced: Any = torch.compile(model, fullgraph=True, backend="eager")  # raises where the graph would break
    x = tokens(2, 13)
    torch.testing.assert_close(
        traced(input_ids=x, use_cache=False).logits, model(input_ids=x).logits, atol=1e-5, rtol=0
    )


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_map_that_leaves_layers_on_the_disk(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    small, path = written("llama", kind, tmp_path)
    x, size = tokens(2, 13), sum(p.numel() * 4 for p in small.parameters())
    whole = loaded(path, device_map="auto")
    assert torch.equal(whole(input_ids=x).logits, loaded(path)(input_ids=x).logits)
    memory: Any = {"cpu": int(0.7 * size)}
    split = loaded(path, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload")
    places = split.hf_device_map
    assert "disk" in places.values() and "cpu" in map(str, places.values())
    assert torch.equal(split(input_ids=x).logits, whole(input_ids=x).logits)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_with_a_static_cache(kind: str, tmp_path: Path) -> None:
    small, path = written("llama", kind, tmp_path)
    small.set_attn_implementation("sdpa")
    half, x = loaded(path, dtype=torch.bfloat16), tokens(2, 9)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    for parameter in small.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # and not the frequencies of RoPE, as model.to would
    assert torch.equal(half(input_ids=x).logits, small(input_ids=x).logits)
    greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    full = loaded(path)
    assert torch.equal(full.generate(x, **greedy), full.generate(x, **greedy, cache_implementation="static"))
    out = half.generate(x, **greedy, cache_implementation="static")
    assert out.shape == (2, 19)
