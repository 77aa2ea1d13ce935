"""A checkpoint for vLLM says of every layer what it is, gives the same logits when read that way, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from tiny import ragged, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from words import bytes_bpe, checkpoint, cut, tiny

from prunus import cli
from prunus.errors import UserError
from prunus.exporting import vllm_export
from prunus.exporting.export import export
from prunus.models.checkpoint import verify
from prunus.models.families import dims
from prunus.searching.space import space_of
from prunus.subnetwork import LayerShape, SubNetwork

ROPE = {"rope_theta": 10000.0}
WHOLE, FULL = LayerShape(4, 2, 80), (4, 2)
LAYERS = (LayerShape(*FULL, 40), LayerShape(0, 0, 33), LayerShape(*FULL, 0), LayerShape(*FULL, 64))


def written(model: Any, directory: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Where it is, what export said, and its config.json."""
    found = export(checkpoint(model, directory), format="vllm")
    target = directory / "model-vllm"
    assert found["file"] == str(target)
    verify(target)
    return target, found, json.loads((target / "config.json").read_text())


def shapes_by_vllm(raw: dict[str, Any]) -> dict[str, list[int]]:
    """The shape of every matrix in the layers, as vLLM's nemotron_nas.py sizes it from the configuration."""
    out, hidden, size, heads = {}, raw["hidden_size"], raw["head_dim"], raw["num_attention_heads"]
    for i, block in enumerate(raw["block_configs"]):
        at = f"model.layers.{i}"
        if not block["attention"]["no_op"]:
            kv = heads // block["attention"]["n_heads_in_group"] * size
            rows = {"q_proj": [heads * size, hidden], "k_proj": [kv, hidden], "v_proj": [kv, hidden]}
            rows["o_proj"] = [hidden, heads * size]
            out |= {f"{at}.self_attn.{name}.weight": shape for name, shape in rows.items()}
            if raw.get("qkv_bias"):
                out |= {f"{at}.self_attn.{n}.bias": [rows[n][0]] for n in ("q_proj", "k_proj", "v_proj")}
        if not block["ffn"]["no_op"]:
            width = block["ffn"]["intermediate_size"]
            rows = {"gate_proj": [width, hidden], "up_proj": [width, hidden], "down_proj": [hidden, width]}
            out |= {f"{at}.mlp.{name}.weight": shape for name, shape in rows.items()}
        norms = {
            "input_layernorm": not block["attention"]["no_op"],
            "post_attention_layernorm": not block["ffn"]["no_op"],
        }
        out |= {f"{at}.{name}.weight": [hidden] for name, there in norms.items() if there}
    return out


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_ragged_layers_as_block_configs(name: str, tmp_path: Path) -> None:
    model = cut(tiny(name), SubNetwork(24, LAYERS))
    target, found, raw = written(model, tmp_path)
    assert found["architecture"] == "DeciLMForCausalLM" and "not loaded in vLLM" in found["verified"]
    assert raw["model_type"] == "nemotron-nas" and raw["architectures"] == ["DeciLMForCausalLM"]
    assert "ffn_mult" not in json.dumps(raw)  # with it vLLM would round widths up to multiples of 256
    with safe_open(target / "model.safetensors", "pt") as weights:
        stored = {key: list(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    assert {k: v for k, v in stored.items() if ".layers." in k} == shapes_by_vllm(raw)
    x = tokens(2, 19)
    again = vllm_export.rebuilt(target, torch.float32)
    again.set_attn_implementation("eager")
    assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)
    assert not (target / "modeling_prunus.py").exists()


def test_the_configuration_class_gives_attributes(tmp_path: Path) -> None:
    target, _, raw = written(cut(tiny("llama"), SubNetwork(48, LAYERS)), tmp_path)
    config = AutoConfig.from_pretrained(target, trust_remote_code=True)
    blocks = config.block_configs
    assert [b.attention.no_op for b in blocks] == [False, True, False, False]
    assert [b.ffn.intermediate_size for b in blocks] == [40, 33, None, 64]
    assert blocks[0].attention.n_heads_in_group == 2 and not hasattr(blocks[0].ffn, "ffn_mult")
    assert config.rope_parameters["rope_theta"] == raw["rope_parameters"]["rope_theta"]
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["block_configs"] == raw["block_configs"]
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    assert tokenizer("the rain")["input_ids"] == bytes_bpe()("the rain")["input_ids"]


def test_other_kv_heads_with_as_many_query_heads(tmp_path: Path) -> None:
    layers = (LayerShape(4, 1, 40), LayerShape(2, 2, 33), LayerShape(4, 1, 80), LayerShape(2, 2, 80))
    _, _, raw = written(cut(tiny("llama"), SubNetwork(48, layers)), tmp_path)
    assert raw["num_attention_heads"] == 4
    assert [b["attention"]["n_heads_in_group"] for b in raw["block_configs"]] == [1, 2, 1, 2]


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_layers_alike_stay_a_stock_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    d = dims(model.config)
    layer = LayerShape(d["kv_heads"], d["q_per_kv"], 33)
    small = cut(model, SubNetwork(48, (layer, LayerShape(0, 0, 0), layer, layer)))
    target, found, raw = written(small, tmp_path)
    assert found["architecture"] == type(small).__name__ and "stock" in found["notes"][0]
    assert "block_configs" not in raw and "auto_map" not in raw
    again = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    x = tokens(1, 11)
    assert torch.equal(again(input_ids=x).logits, small(input_ids=x).logits)


def test_fewer_heads_of_qwen2_need_block_configs(tmp_path: Path) -> None:
    """vLLM's Qwen2 takes a head for hidden size / heads, whatever the configuration says."""
    small = cut(tiny("qwen2"), SubNetwork(48, (LayerShape(2, 2, 40),) * 4))
    _, found, raw = written(small, tmp_path)
    assert found["architecture"] == "DeciLMForCausalLM" and raw["qkv_bias"] is True


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[LayerShape, ...] | None, str]] = {
    "heads differ": ("llama", {}, (LayerShape(4, 2, 80), LayerShape(3, 2, 80), WHOLE, WHOLE), "have 6, 8"),
    "another family": ("gemma2", {}, None, "this is a gemma2"),
    "norms on queries": ("qwen3", {}, LAYERS, "this is a qwen3"),
    "a window": ("mistral", {"sliding_window": 32}, LAYERS, "sliding window of 32"),
    "another activation": ("llama", {"hidden_act": "relu"}, LAYERS, "computes silu, not relu"),
    "another rope": (
        "llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, LAYERS, "type dynamic",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_block_configs_cannot_say(case: str, tmp_path: Path) -> None:
    name, changes, layers, words = REFUSED[case]
    model = tiny(name, **changes)
    sub = SubNetwork(48, layers) if layers else ragged(model.config)
    with pytest.raises(UserError, match=rf"{words}.*search\.attention=whole.*--uniform") as caught:
        export(checkpoint(cut(model, sub), tmp_path), format="vllm")
    assert ("transformers backend" in str(caught.value)) == (case == "heads differ")  # the others lack an attention
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_wrong_logits_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = vllm_export._block

    def other(shape: LayerShape) -> dict[str, Any]:
        block = own(shape)
        if not shape.attends:
            return block
        block["attention"]["n_heads_in_group"] *= 2
        return block

    monkeypatch.setattr(vllm_export, "_block", other)
    with pytest.raises(UserError, match="not those that block_configs describe"):
        export(checkpoint(cut(tiny("llama"), SubNetwork(48, LAYERS)), tmp_path), format="vllm")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_every_network_of_the_space_can_be_written() -> None:
    import random

    model = tiny("llama")
    space, rng = space_of(model.config, mlp_step=16, attention="whole"), random.Random(0)
    for _ in range(20):
        sub = space.sample(rng)
        alive = cut(model, sub)
        shapes = vllm_export.shapes_of(alive.config)
        raw = vllm_export.block_configuration(alive.config, shapes)
        assert len(raw["block_configs"]) == len(sub.alive)


@pytest.mark.parametrize("layers", [LAYERS, (WHOLE,) * 4])
def test_every_file_may_be_read_by_whoever_reads_its_configuration(
    layers: tuple[LayerShape, ...], tmp_path: Path
) -> None:
    target, _, _ = written(cut(tiny("llama"), SubNetwork(48, layers)), tmp_path)
    modes = {path.name: oct(path.stat().st_mode) for path in target.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_command(tmp_path: Path) -> None:
    where = checkpoint(cut(tiny("llama"), SubNetwork(48, LAYERS)), tmp_path)
    done = CliRunner().invoke(cli.app, ["export", where, "--format", "vllm"], prog_name="prunus")
    assert done.exit_code == 0, done.output
    assert "DeciLMForCausalLM" in done.stdout and "--trust-remote-code" in done.stderr
    again = CliRunner().invoke(cli.app, ["export", where, "--format", "vllm"], prog_name="prunus")
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    over = CliRunner().invoke(cli.app, ["export", where, "--format", "vllm", "--overwrite"], prog_name="prunus")
    assert over.exit_code == 0, over.output
