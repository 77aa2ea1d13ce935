"""SliceGPT: a rotation changes nothing, a cut of what is never used changes nothing, and the checkpoint loads alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from transformers import AutoModelForCausalLM

from prunus.baselines.slicegpt import directions, parameters, rotated
from prunus.baselines.subject import Subject
from prunus.baselines.table import ROTATED, TABLE
from prunus.evaluation import parameters as counted
from prunus.models import loading
from prunus.models.checkpoint import save
from prunus.models.families import family_of


def logits(model: Any, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(tokens() if ids is None else ids, **options).logits
    return out


@pytest.mark.parametrize("name", [*ROTATED, "llama-mqa-tied-bias"])
def test_rotating_without_cutting_leaves_the_function(name: str) -> None:
    model: Any = tiny(name)
    s = Subject(model, tokens(4, 32))
    same = rotated(s, 48)
    assert torch.allclose(logits(same), logits(model), atol=2e-4)
    again: Any = same
    assert again.lm_head.weight is not again.get_input_embeddings().weight


def test_directions_that_are_never_used_are_cut_without_loss() -> None:
    """Embedding and writers write into 30 of 48 dimensions of the stream, in a basis of their own."""
    model: Any = tiny("llama")
    basis = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0][:, :30]
    flat = basis @ basis.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ flat)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(flat @ writer.weight)
    s = Subject(model, tokens(6, 32))
    small = rotated(s, 30)
    assert torch.allclose(logits(small), logits(model), atol=1e-3)
    fewer = rotated(s, 29)
    assert float((logits(fewer) - logits(model)).abs().max()) > 1e-2


def test_directions_are_those_of_greatest_variance() -> None:
    x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, -5.0]])
    found = directions([x], 2)
    assert found.abs().round(decimals=4).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_shortcut_matrices_are_counted() -> None:
    """Each of 4 layers: q, k, v, o and three MLP matrices with k channels, two k x k shortcuts; the last writes 48."""
    model: Any = tiny("llama")
    k, inner = 20, (64 + 32 + 32 + 64) + 3 * 80
    want = 4 * (k * inner + 2 * k * k) + (48 - k) * (80 + k)
    assert parameters(model.config, k) == want
    outcome = TABLE["slicegpt"].run(Subject(model, tokens(4, 32)), 0.7)
    assert counted(outcome.model)["blocks"] == parameters(model.config, outcome.sub.hidden)
    assert f"{outcome.sub.hidden} of 48 directions" in outcome.notes[0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_checkpoint_loads_without_prunus_and_decodes_with_a_cache(name: str, tmp_path: Path) -> None:
    model: Any = tiny(name)
    small: Any = TABLE["slicegpt"].run(Subject(model, tokens(4, 32)), 0.7).model
    save(small, None, tmp_path / "c", card="", manifest={})
    for options in ({}, {"trust_remote_code": True}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "c", attn_implementation="eager", **options).eval()
        assert torch.allclose(logits(again), logits(small), atol=1e-5)
    ids = tokens(2, 9)
    first = small(ids[:, :6], use_cache=True)
    rest = logits(small, ids[:, 6:], past_key_values=first.past_key_values)
    assert torch.allclose(rest, logits(small, ids)[:, 6:], atol=1e-4)
    assert family_of(small.config).name in ("llama", "qwen3", "phi3")
    if name == "llama":  # a process that has never seen Prunus
        code = (
            "import sys; from transformers import AutoModelForCausalLM as A; "
            f"m = A.from_pretrained({str(tmp_path / 'c')!r}, trust_remote_code=True); "
            "assert 'prunus' not in sys.modules; print(sum(p.numel() for p in m.parameters()))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
        assert int(done.stdout) == sum(p.numel() for p in small.parameters())


def test_a_sliced_checkpoint_is_evaluated_and_not_compressed_again(tmp_path: Path) -> None:
    small = TABLE["slicegpt"].run(Subject(tiny("llama"), tokens(4, 32)), 0.7).model
    save(small, None, tmp_path / "c", card="", manifest={"source": {"id": "the-dense-one"}})
    with pytest.raises(loading.UserError, match="the-dense-one"):
        loading.load(str(tmp_path / "c"))
