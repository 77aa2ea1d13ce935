"""Ragged models: the extracted one is the activated sub-network, whatever runs it, with and without Prunus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, GQA, indexed, ragged, tiny, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from prunus.models import ragged as modelling
from prunus.models.checkpoint import save
from prunus.models.families import FAMILIES, dims, family_of
from prunus.models.slicing import activate, extract
from prunus.subnetwork import LayerShape, SubNetwork

NAMES = sorted(CONFIGS)
GREEDY: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)


def subnetworks(config: Any) -> dict[str, SubNetwork]:
    d = dims(config)
    whole, small = LayerShape(d["kv_heads"], d["q_per_kv"], d["mlp"]), LayerShape(2, 1, 24)
    if d["kv_heads"] == 1:
        small = LayerShape(1, 3, 24)
    return {
        "ragged": ragged(config),
        "ragged at full hidden size": ragged(config, hidden=False),
        "named members": indexed(config),
        "a layer left out": SubNetwork(d["hidden"], (whole, LayerShape(0, 0, 0), small, LayerShape(1, 1, 0))),
        "alike layers": SubNetwork(40, (small,) * 4),
    }


SHAPES = list(subnetworks(CONFIGS["llama"]()))


def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def pair(name: str, shape: str = "ragged", **kwargs: Any) -> tuple[torch.nn.Module, Any, SubNetwork, Any]:
    """A super-network, its family, a sub-network and that sub-network extracted as a ragged model."""
    model = tiny(name, **kwargs)
    family, sub = family_of(model.config), subnetworks(model.config)[shape]
    return model, family, sub, extract(model, family, sub, uniform=False)


def saved(model: Any, directory: Path) -> Path:
    save(model, None, directory, card="a card", manifest={})
    return directory


def test_every_known_model_type_has_its_classes() -> None:
    assert set(modelling.CLASSES) == {f"prunus_{model_type}" for model_type in FAMILIES}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_activated_extracted_and_reloaded_are_one_function(name: str, shape: str, tmp_path: Path) -> None:
    model, family, sub, small = pair(name, shape)
    ids = tokens()
    with activate(model, family, sub):
        want = logits(model, ids)
    assert type(small).__name__.startswith("Prunus")
    assert torch.equal(logits(small, ids), want)
    again = AutoModelForCausalLM.from_pretrained(saved(small, tmp_path / "a"), attn_implementation="eager")
    assert type(again) is type(small)
    assert torch.equal(logits(again, ids), want)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_too(name: str, tmp_path: Path) -> None:
    model, family, sub, _ = pair(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()  # as from_pretrained does: buffers stay float32
    small = extract(model, family, sub, uniform=False)
    with activate(model, family, sub):
        want = logits(model, tokens())
    again = AutoModelForCausalLM.from_pretrained(saved(small, tmp_path / "a"), attn_implementation="eager")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(small, tokens()), want)
    assert torch.equal(logits(again, tokens()), want)


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_the_same_under_every_cache(name: str) -> None:
    model, family, sub, small = pair(name)
    ids = tokens(length=9)
    with activate(model, family, sub):
        want = model.generate(ids, **GREEDY)
    static = {"cache_implementation": "static"}
    for options in ({}, {"use_cache": False}, static, {**static, "prefill_chunk_size": 4}):
        assert torch.equal(small.generate(ids, **GREEDY, **options), want), options
    with activate(model, family, sub):
        beams = model.generate(ids, **GREEDY, num_beams=3)
    assert torch.equal(small.generate(ids, **GREEDY, num_beams=3), beams)


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_changes_nothing(name: str) -> None:
    small = pair(name)[3]
    short, long = tokens(1, 5, seed=3), tokens(1, 9, seed=4)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    out = small.generate(batch, attention_mask=mask, **GREEDY)[:, 9:]
    alone = [small.generate(ids, **GREEDY)[0, ids.shape[1] :] for ids in (short, long)]
    assert torch.equal(out, torch.stack(alone))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2", "llama"])
@pytest.mark.parametrize("dropped", [1, 2])
@pytest.mark.parametrize("first", [0, 1])
def test_a_dropped_attention_does_not_mislead_masks(
    name: str, first: int, dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks take their length from the first layer of each attention type, which may be the dropped one."""

    def mixed() -> Any:
        raw = CONFIGS[name]().to_dict()
        others = ["full_attention", "sliding_attention"]
        kinds = [others[first], others[1 - first], others[1 - first], others[first]]
        if name != "llama":
            raw |= {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 8}
        return type(CONFIGS[name]())(**raw)

    monkeypatch.setitem(CONFIGS, "mixed", mixed)
    model = tiny("mixed")
    d = dims(model.config)
    whole = LayerShape(d["kv_heads"], d["q_per_kv"], d["mlp"])
    layers = tuple(LayerShape(0, 0, 9) if i == dropped else whole for i in range(4))
    family, sub = family_of(model.config), SubNetwork(d["hidden"], layers)
    small = extract(model, family, sub)
    ids = tokens(length=12)  # longer than the window
    plain = small.generate(ids, **GREEDY, use_cache=False)
    with activate(model, family, sub):
        assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), plain)
        assert torch.equal(model.generate(ids, **GREEDY), plain)
    assert torch.equal(small.generate(ids, **GREEDY), plain)
    assert torch.equal(small.generate(ids, **GREEDY, cache_implementation="static"), plain)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gemma2"])  # sdpa cannot cap its scores
def test_attention_implementations_agree_and_can_be_switched(name: str, tmp_path: Path) -> None:
    small, ids = pair(name)[3], tokens()
    want = logits(small, ids)
    sdpa = AutoModelForCausalLM.from_pretrained(saved(small, tmp_path / "a"), attn_implementation="sdpa")
    assert torch.allclose(logits(sdpa, ids), want, atol=1e-5)
    sdpa.set_attn_implementation("eager")
    assert torch.equal(logits(sdpa, ids), want)


@pytest.mark.parametrize("name", NAMES)
def test_the_base_model_alone_and_a_second_save(name: str, tmp_path: Path) -> None:
    small, ids = pair(name)[3], tokens()
    first = saved(small, tmp_path / "a")
    base = AutoModel.from_pretrained(first, attn_implementation="eager")
    with torch.no_grad():
        hidden = base(ids).last_hidden_state
        head = small.get_output_embeddings()(hidden)
    if name != "gemma2":  # which caps its logits after the head
        assert torch.equal(head, logits(small, ids))
    again = AutoModelForCausalLM.from_pretrained(first)
    again.save_pretrained(tmp_path / "b")
    for file in ("config.json", "model.safetensors", "modeling_prunus.py"):
        one, two = ((tmp_path / d / file).read_bytes() for d in "ab")
        if file == "config.json":
            one, two = ({**json.loads(x), "rope_theta": 0, "rope_scaling": 0} for x in (one, two))
            one = {k: v for k, v in one.items() if k in two}
        assert one == two, file


ALONE = """
import sys
sys.modules["prunus"] = None  # as if it were not installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
for path in sys.argv[2:]:
    assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type.startswith("prunus_")
    AutoModel.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")
    model.save_pretrained(path + "-again")
    model = AutoModelForCausalLM.from_pretrained(path + "-again", trust_remote_code=True, attn_implementation="eager")
    ids = torch.load(sys.argv[1], weights_only=True)
    with torch.no_grad():
        torch.save((model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)), path + ".out")
"""


def test_loads_with_trusted_code_where_prunus_is_not_installed(tmp_path: Path) -> None:
    ids, models = tokens(), {}
    torch.save(ids, tmp_path / "ids")
    for name in ("llama", "gemma3", "phi3", "gpt2"):
        models[name] = pair(name)[3]
        saved(models[name], tmp_path / name)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "ids"), *(str(tmp_path / name) for name in models)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        out, text = torch.load(tmp_path / f"{name}.out", weights_only=True)
        assert torch.equal(out, logits(model, ids))
        assert torch.equal(text, model.generate(ids, max_new_tokens=5, do_sample=False))


def test_an_adapter_trains_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    small, ids = pair("llama")[3], tokens()
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(small, config)
    loss = tuned(ids, labels=ids).loss
    loss.backward()
    grown = [p for p in tuned.parameters() if p.grad is not None]
    assert grown and all("lora" in n for n, p in tuned.named_parameters() if p.grad is not None)
    torch.optim.SGD(grown, lr=0.1).step()
    want = logits(tuned, ids)
    merged = tuned.merge_and_unload()
    assert torch.allclose(logits(merged, ids), want, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(saved(merged, tmp_path / "a"), attn_implementation="eager")
    assert torch.equal(logits(again, ids), logits(merged, ids))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    small, ids = pair(name)[3], tokens()
    found = []
    for checkpointing in (False, True):
        small.zero_grad()
        small.train()
        for module in small.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        if checkpointing:
            small.gradient_checkpointing_enable()
        torch.manual_seed(0)
        small(ids, labels=ids).loss.backward()
        found.append({n: p.grad.clone() for n, p in small.named_parameters()})
    assert all(g.isfinite().all() for g in found[0].values())
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, rtol=1e-5, atol=1e-6, msg=n)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    small = pair("qwen2")[3]
    again = AutoModelForCausalLM.from_pretrained(saved(small, tmp_path / "a"))
    for model in (small, again):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())


def test_numbered_attention_scales_keep_the_numbers_they_had(tmp_path: Path) -> None:
    """GPT-2 may divide scores by the layer's number; leaving a layer out must not change the others' numbers."""
    config = GPT2Config(
        vocab_size=97, n_embd=48, n_layer=4, n_head=8, n_positions=64, scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    family, whole = family_of(config), LayerShape(8, 1, 192)
    sub = SubNetwork(48, (whole, LayerShape(0, 0, 0), whole, whole))
    with activate(model, family, sub):
        want = logits(model, tokens())
    small = extract(model, family, sub)
    again = AutoModelForCausalLM.from_pretrained(saved(small, tmp_path / "a"), attn_implementation="eager")
    assert torch.equal(logits(small, tokens()), want)
    assert torch.equal(logits(again, tokens()), want)


def test_configuration_holds_only_what_differs_and_names_all_auto_classes(tmp_path: Path) -> None:
    small = pair("llama", "a layer left out")[3]
    raw = json.loads((saved(small, tmp_path / "a") / "config.json").read_text())
    assert raw["num_hidden_layers"] == 3
    assert raw["per_layer_config"] == {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24},
        "2": {"num_attention_heads": 1, "num_key_value_heads": 1, "skip": ["mlp"]},
    }
    assert set(raw["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert all(hasattr(modelling, value.split(".")[1]) for value in raw["auto_map"].values())
    assert AutoConfig.from_pretrained(tmp_path / "a").per_layer_config[2].num_attention_heads == 1


def test_a_configuration_that_cannot_run_is_refused() -> None:
    config = modelling.PrunusLlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
        per_layer_config={1: {"num_attention_heads": 6}},
    )  # fmt: skip
    with pytest.raises(ValueError, match="layer 1 has 6 heads for 4 key-value heads"):
        AutoModelForCausalLM.from_config(config)


def _long(kind: str) -> Any:
    """A tiny configuration whose RoPE changes once a text is longer than 16 tokens, or is stretched from the start."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.2, 1.5], "long_factor": [2.0, 3.0, 4.0]}
        raw = {key: value for key, value in GQA.items() if key != "max_position_embeddings"}
        return Phi3Config(
            **raw, max_position_embeddings=64, original_max_position_embeddings=16, sliding_window=None,
            rope_parameters=rope,
        )  # fmt: skip
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "dynamic":
        return LlamaConfig(**{**GQA, "max_position_embeddings": 16}, head_dim=8, rope_parameters=rope)
    return LlamaConfig(**GQA, head_dim=8, rope_parameters=rope)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn", "llama3", "linear"])
def test_every_kind_of_rope_below_and_above_its_first_length(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, kind, lambda: _long(kind))
    model, family, sub, small = pair(kind)
    again = AutoModelForCausalLM.from_pretrained(saved(small, tmp_path / "a"), attn_implementation="eager")
    for length in (9, 40, 9):
        ids = tokens(length=length)
        with activate(model, family, sub):
            want = logits(model, ids)
        assert torch.equal(logits(small, ids), want), length
        assert torch.equal(logits(again, ids), want), length
