"""SliceGPT: a rotation changes nothing, a cut of what is never used changes nothing, and the checkpoint loads alone.

The tiny models have random norms and biases, so a bias or a mean that is folded wrongly shows in the logits.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import COMMON, CONFIGS, tiny, tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, PhiConfig

from prunus.baselines.slicegpt import centre, directions, parameters, rotated
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


LAYER_NORMS = ("phi", "gpt_neox", "opt", "gpt2")
OTHERWISE: dict[str, Any] = {  # what these families also come as
    "phi": lambda: PhiConfig(**COMMON, partial_rotary_factor=0.67, tie_word_embeddings=True),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, rotary_pct=0.5, use_parallel_residual=False, attention_bias=False),
    "opt": lambda: OPTConfig(
        **{**COMMON, "intermediate_size": 80}, ffn_dim=80, word_embed_proj_dim=48, enable_bias=False
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=48, n_layer=4, n_head=8, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
}


@pytest.fixture
def otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in OTHERWISE.items():
        monkeypatch.setitem(CONFIGS, name, config)


@pytest.mark.parametrize("name", [*ROTATED, "llama-mqa-tied-bias"])
def test_rotating_without_cutting_leaves_the_function(name: str) -> None:
    model: Any = tiny(name)
    s = Subject(model, tokens(4, 32))
    same = rotated(s, 48)
    assert torch.allclose(logits(same), logits(model), atol=1e-4)
    again: Any = same
    assert again.lm_head.weight is not again.get_input_embeddings().weight


@pytest.mark.parametrize("name", LAYER_NORMS)
@pytest.mark.usefixtures("otherwise")
def test_layer_norm_families_in_their_other_forms(name: str) -> None:
    """No biases where a layer norm's must go, tied embeddings, attention and MLP one after the other, MLP of 4 x 48."""
    model: Any = tiny(name)
    s = Subject(model, tokens(4, 32))
    assert torch.allclose(logits(rotated(s, 48)), logits(model), atol=1e-4)
    assert counted(TABLE["slicegpt"].run(s, 0.7).model)["blocks"] <= 0.7 * s.blocks


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_a_layer_norm_never_sees_the_mean_so_one_direction_leaves_without_loss(name: str) -> None:
    model: Any = tiny(name)
    s = Subject(model, tokens(4, 32))
    assert torch.allclose(logits(rotated(s, 47)), logits(model), atol=1e-4)
    assert float((logits(rotated(s, 46)) - logits(model)).abs().max()) > 1e-2
    head = model.get_output_embeddings().weight.clone()
    own = s.copy()
    centre(own, s.family)
    own.get_output_embeddings().weight = torch.nn.Parameter(head)  # tied to the embedding in gpt2 and opt
    states = s.stream.embed(s.ids).detach(), type(s.stream)(own, s.family).embed(s.ids).detach()
    assert float(states[1].mean(-1).abs().max()) < 1e-6 < float(states[0].mean(-1).abs().max())
    assert torch.allclose(logits(own), logits(model), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi", "gpt_neox"])
def test_each_rotation_is_computed_on_what_the_cut_layers_produce(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that the last rotation is taken from are those of the finished network, seen from outside."""
    bases: list[torch.Tensor] = []
    states: list[torch.Tensor] = []

    def watched(given: list[torch.Tensor], size: int) -> torch.Tensor:
        states.append(given[0])
        bases.append(directions(given, size))
        return bases[-1]

    monkeypatch.setattr("prunus.baselines.slicegpt.directions", watched)
    s = Subject(tiny(name), tokens(4, 32))
    small: Any = rotated(s, 30)
    layers = small.get_submodule(s.family.layers)
    caught: list[torch.Tensor] = []
    layers[3].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    logits(small, s.ids)
    at = 3 if layers[3].parallel else 6  # before every layer, and inside it where attention and MLP do not share
    want = states[at].double() @ bases[at]
    assert torch.allclose(caught[0].double(), want, atol=1e-4)


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


def test_one_shortcut_where_attention_and_mlp_read_the_same_stream() -> None:
    """Phi: q, dense and two MLP matrices with their biases, k and v of 4 groups, norms of heads; the last writes 48."""
    model: Any = tiny("phi")
    k, heads, groups, width = 20, 8 * 6, 4 * 6, 80
    reads = (k + 1) * (heads + 2 * groups + width) + 4 * 6
    writes = (heads + width + 2) * k
    assert parameters(model.config, k) == 4 * (reads + writes + k * k) + (48 - k) * (heads + width + 2 + k)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", *LAYER_NORMS])
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
    generated = [small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*generated)
    assert family_of(small.config).name == name
    if name in ("llama", "gpt2"):  # a process that has never seen Prunus
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
