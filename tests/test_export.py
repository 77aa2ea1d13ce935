"""A checkpoint exported as GGUF is the same function in llama.cpp, or it is refused with a reason before it exists."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner
from tiny import ragged
from words import RUNTIME, checkpoint, cut, fields, tiny

from prunus import cli
from prunus.errors import UserError
from prunus.exporting import architectures, gguf_tensors, llamacpp
from prunus.exporting import export as module
from prunus.exporting.architectures import CARRIERS, GEMMA2
from prunus.exporting.export import export
from prunus.exporting.gguf_tensors import BLOCK, QUANTS, llama3_factors, neighbours, rounded
from prunus.models.families import dims
from prunus.subnetwork import LayerShape, SubNetwork

OWN = {
    "llama": "llama", "llama-mqa-tied-bias": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3": "gemma3", "olmo2": "olmo2", "phi": "phi2", "phi3": "phi3", "gpt_neox": "gptneox",
    "gpt2": "gpt2",
}  # fmt: skip
PER_LAYER = {
    "llama": "deci", "llama-mqa-tied-bias": "deci", "mistral": "deci", "qwen2": "deci", "phi3": "deci",
    "qwen3": "openelm",
}  # fmt: skip
FEWER_HEADS = {"llama": "llama", "qwen2": "llama", "qwen3": "qwen3", "phi3": "llama", "gemma2": "gemma2"}
ROPE: dict[str, Any] = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def exported(model: Any, directory: Path, quant: str = "f32", **options: Any) -> dict[str, Any]:
    found = export(checkpoint(model, directory, options.pop("words", None)), quant=quant, **options)
    assert Path(found["file"]).stat().st_size == found["file_bytes"]
    assert [p.name for p in directory.iterdir() if p.name.startswith(".")] == []
    if llamacpp.installed():
        assert found["arithmetic_nats"] < {"f32": 1e-6, "f16": 1e-5, "q8_0": 1e-2, "q4_0": 1e-2}.get(quant, 0.1)
    return found


# ------------------------------------------------------------------------------------------------ the same function


@pytest.mark.parametrize("name", OWN)
def test_a_dense_model_is_written_as_its_own_architecture(name: str, tmp_path: Path) -> None:
    found = exported(tiny(name), tmp_path)
    assert found["architecture"] == OWN[name]
    assert found["file"] == str(tmp_path / "model-f32.gguf")


@pytest.mark.parametrize("name", FEWER_HEADS)
def test_a_uniform_model_with_fewer_heads(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    d = dims(model.config)
    small = cut(model, SubNetwork(d["hidden"], (LayerShape(2, d["q_per_kv"], 32),) * 4))
    assert exported(small, tmp_path)["architecture"] == FEWER_HEADS[name]


@pytest.mark.parametrize("name", [name for name in OWN if name not in FEWER_HEADS])
def test_a_uniform_model_with_fewer_neurons_and_layers(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    d = dims(model.config)
    layer = LayerShape(d["kv_heads"], d["q_per_kv"], 33)
    small = cut(model, SubNetwork(d["hidden"], (layer, LayerShape(0, 0, 0), layer, layer)))
    found = exported(small, tmp_path)
    assert found["architecture"] == OWN[name]
    assert fields(found)[f"{OWN[name]}.block_count"] == 3


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_ragged_model_is_written_with_the_widths_of_each_layer(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    sub = ragged(model.config)  # an attention and an MLP are gone, and half the hidden size
    found = exported(cut(model, sub), tmp_path)
    assert found["architecture"] == PER_LAYER[name]
    written = fields(found)
    kv_heads = written[f"{PER_LAYER[name]}.attention.head_count_kv"]
    assert kv_heads[:2] == [s.kv_heads for s in sub.layers[:2]]
    assert kv_heads[2] == (0 if PER_LAYER[name] == "deci" else 1)  # openelm needs a head: one of zeros
    assert written[f"{PER_LAYER[name]}.feed_forward_length"] == [*(s.mlp for s in sub.layers[:3]), gguf_tensors.STUB]


@RUNTIME
@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_of_matrix(quant: str, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=64, intermediate_size=96, num_attention_heads=8)
    layers = tuple(LayerShape(4, 2, width) for width in (96, 40, 64, 32))
    found = exported(cut(model, SubNetwork(64, layers)), tmp_path, quant)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(found["file"]).tensors}
    assert kinds["blk.0.ffn_down.weight"] == QUANTS[quant]
    assert kinds["blk.1.ffn_up.weight"] == QUANTS[quant]
    blocks = quant in ("q8_0", "q4_0")
    assert kinds["blk.1.ffn_down.weight"] == ("F16" if blocks else QUANTS[quant])  # rows of 40
    assert kinds["token_embd.weight"] == ("Q8_0" if blocks else QUANTS[quant])
    assert kinds["output_norm.weight"] == "F32"
    assert any("stay in f16" in note for note in found["notes"]) == blocks
    assert found["divergence_nats"] < {"f32": 1e-6, "f16": 1e-4, "q8_0": 1e-2, "q4_0": 0.5}[quant]


@RUNTIME
@pytest.mark.parametrize(("quant", "kind"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K"), ("q6_k", "Q6_K")])
def test_k_quants_by_llama_cpp(quant: str, kind: str, tmp_path: Path) -> None:
    model = tiny("qwen2", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    layers = tuple(LayerShape(4, 2, width) for width in (512, 288, 256, 512))
    found = exported(cut(model, SubNetwork(256, layers)), tmp_path, quant)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(found["file"]).tensors}
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.2.attn_q.weight"] == kind
    assert kinds["blk.1.ffn_down.weight"] not in ("F32", kind) and kinds["output_norm.weight"] == "F32"
    assert any("1 matrices are" in note and "blk.1.ffn_down" in note for note in found["notes"])
    assert found["arithmetic_nats"] < 0.2 * found["divergence_nats"]  # so it is rounding that keeps them apart
    assert [p.name for p in tmp_path.iterdir()] == ["model", f"model-{quant}.gguf"]


def test_k_quants_need_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "installed", lambda: None)
    with pytest.raises(UserError, match=r"prunus\[llama-cpp\]"):
        export(str(tmp_path), quant="q4_k_m")


@pytest.mark.parametrize("name", OWN)
def test_weights_taken_back_from_a_file_are_those_that_were_rounded(name: str) -> None:
    a, b = tiny(name), tiny(name)
    _, _, planned = module.planning(a, "f16")
    for tensor in planned:
        if tensor.modules and len(tensor.shape) == 2:
            gguf_tensors.take_back(tensor, rounded(tensor.make(), tensor.kind))
    gguf_tensors.round_weights(module.planning(b, "f16")[2])
    for (path, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0 if name != "gemma2" else 1e-3, rtol=0, msg=path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_taken_back_into_sixteen_bits_are_in_their_places(dtype: torch.dtype) -> None:
    """More rows than either type can count."""
    model = tiny("llama", intermediate_size=2304).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for tensor in module.planning(model, "f16")[2]:
        if tensor.modules and len(tensor.shape) == 2:
            gguf_tensors.take_back(tensor, tensor.make())
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        assert torch.equal(p, before[name]), name


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2, another attention scale": ("gemma2", {"query_pre_attn_scalar": 24}),
    "gemma3, another attention scale": ("gemma3", {"query_pre_attn_scalar": 24}),
    "gemma2, windows in other layers": ("gemma2", {"sliding_window": 16, "layer_types": MIXED}),
    "gemma3, windows in other layers": ("gemma3", {"sliding_window": 16, "layer_types": MIXED}),
    "gemma2, no windows": ("gemma2", {"layer_types": ["full_attention"] * 4}),
    "gemma3, capped logits": ("gemma3", {"final_logit_softcapping": 5.0}),
    "llama, Llama 3.1's RoPE": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2, linear RoPE": ("qwen2", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
    "phi3, a part of each head turns": (
        "phi3", {"rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.67}}
    ),
    "phi3, long RoPE": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **ROPE, "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 3.0, 4.0]
            },
        },
    ),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, no biases": ("gpt_neox", {"attention_bias": False}),
    "olmo2, tied": ("olmo2", {"tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_configurations_may_say(variant: str, tmp_path: Path) -> None:
    name, changes = VARIANTS[variant]
    assert exported(tiny(name, **changes), tmp_path)["architecture"] == OWN[name]


def test_ragged_with_llama_3_rope(tmp_path: Path) -> None:
    model = tiny("llama", rope_parameters=LLAMA3)
    assert exported(cut(model, ragged(model.config)), tmp_path)["architecture"] == "deci"


def test_a_window_that_the_architecture_lacks_ends_the_context(tmp_path: Path) -> None:
    found = exported(tiny("mistral", sliding_window=32), tmp_path)
    assert fields(found)["llama.context_length"] == 32
    assert any("sliding window" in note for note in found["notes"])


def test_rows_whose_pairs_are_halves_become_neighbours() -> None:
    rows = torch.arange(8)[:, None]  # two heads of four: pairs (0, 2) (1, 3), (4, 6) (5, 7)
    assert neighbours(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_divisors_of_llama_3_agree_with_transformers() -> None:
    model = tiny("llama", rope_parameters=LLAMA3, head_dim=32)
    plain = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / llama3_factors(LLAMA3, 32), model.model.rotary_emb.inv_freq, rtol=1e-5)


def test_rounding_keeps_what_a_block_can_hold() -> None:
    numbers = torch.randn(4, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    scale = numbers.unflatten(1, (2, BLOCK)).abs().amax(-1).repeat_interleave(BLOCK, 1)
    half = 2**-11  # of f16, which scales are kept in too
    for kind, bound in (("f16", half), ("q8_0", 0.5 / 127 + half), ("q4_0", 1 / 8 + half)):
        error = (rounded(numbers, kind) - numbers).abs() / scale
        assert bound / 4 < float(error.max()) <= bound


# ------------------------------------------------------------------------------------- what is wrong is not handed over


@RUNTIME
@pytest.mark.parametrize("broken", ["rope", "norms", "scale"])
def test_another_function_is_deleted(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma3", query_pre_attn_scalar=24) if broken == "scale" else tiny("gemma2")
    if broken == "rope":
        model = tiny("llama")
        monkeypatch.setattr(gguf_tensors, "neighbours", lambda rows, head_dim: rows)
    elif broken == "norms":
        carriers = {**CARRIERS, "gemma2": (replace(GEMMA2, norm_offset=0.0),)}
        monkeypatch.setattr(architectures, "CARRIERS", carriers)
    else:
        monkeypatch.setattr(gguf_tensors, "query_scale", lambda *_: 1.0)
    with pytest.raises(UserError, match="computes something else than PyTorch"):
        exported(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@RUNTIME
def test_a_file_that_ends_the_process_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_mlp(*_: Any) -> tuple[int, int, int]:
        return 8, 4, 0

    monkeypatch.setattr("prunus.exporting.gguf_file._widths", no_mlp)
    with pytest.raises(UserError, match=r"cannot load the file .* deleted"):
        exported(tiny("llama"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_without_llama_cpp_the_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "installed", lambda: None)
    found = export(checkpoint(tiny("qwen3"), tmp_path), quant="q8_0")
    assert found["verified"].startswith("read back")
    assert "llama-cpp-python" in found["notes"][-1]
    assert "divergence_nats" not in found


def test_a_tensor_that_is_not_as_meant_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.write

    def less(path: Path, name: str, one: Any, planned: list[Any], *rest: Any) -> None:
        whole(path, name, one, planned[:-1], *rest)

    monkeypatch.setattr(module, "write", less)
    with pytest.raises(UserError, match=r"blk\.3\.ffn_down\.weight"):
        exported(tiny("llama"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", [name for name in OWN if name not in PER_LAYER])
def test_ragged_layers_are_refused_where_no_architecture_has_them(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    with pytest.raises(UserError, match=r"one width for all layers.*--uniform"):
        exported(cut(model, ragged(model.config)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no architecture": ("opt", {}, "no architecture for model_type 'opt'"),
    "another activation": ("llama", {"hidden_act": "relu"}, "its MLP computes silu, not relu"),
    "another RoPE": ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}, "not yarn"),
    "norms on queries": ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    "a bias too many": ("qwen3", {"attention_bias": True}, r"no place for '.*o_proj\.bias'"),
    "no caps": ("gemma2", {"final_logit_softcapping": None}, "always caps its final"),
    "caps": ("gemma3", {"attn_logit_softcapping": 30.0}, "no attn_logit_softcapping"),
    "another attention scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "root of the head size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_no_architecture_computes(case: str, tmp_path: Path) -> None:
    name, changes, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        exported(tiny(name, **changes), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_untied_ragged_qwen3_is_refused(tmp_path: Path) -> None:
    model = tiny("qwen3", tie_word_embeddings=False)
    with pytest.raises(UserError, match="openelm: its output matrix is its embedding"):
        exported(cut(model, ragged(model.config)), tmp_path)


def test_heads_that_a_square_architecture_cannot_hold(tmp_path: Path) -> None:
    model = tiny("olmo2")
    with pytest.raises(UserError, match="heads x head size = hidden size, and here 24 is not 48"):
        exported(cut(model, SubNetwork(48, (LayerShape(2, 2, 32),) * 4)), tmp_path)


def test_numbers_beyond_float16(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight.*--quant f32"):
        exported(model, tmp_path, "f16")


def test_bad_arguments(tmp_path: Path) -> None:
    where = checkpoint(tiny("llama"), tmp_path)
    with pytest.raises(UserError, match=r"unknown quantisation 'q2_k'.*q8_0"):
        export(where, quant="q2_k")
    with pytest.raises(UserError, match="unknown format 'mlx'"):
        export(where, format="mlx")
    with pytest.raises(UserError, match="is a directory"):
        export(where, out=tmp_path)
    taken = tmp_path / "taken.gguf"
    taken.write_text("GGUF of before")
    with pytest.raises(UserError, match="--overwrite"):
        export(where, out=taken)
    assert taken.read_text() == "GGUF of before"
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is no GGUF file, so no export wrote it"):
        export(where, out=tmp_path / "mine.txt", overwrite=True)
    with pytest.raises(UserError, match="is a directory"):
        export(where, out=f"{tmp_path}/folder/")
    with pytest.raises(UserError, match="is no GGUF file; --tokenizer takes"):
        export(where, tokenizer=str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match="is the checkpoint itself"):
        export(str(taken), out=taken, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert export(where, out=taken, overwrite=True, quant="f32")["file_bytes"] == taken.stat().st_size > 8


@pytest.mark.parametrize("name", ["nowhere.gguf", "mine.txt"])
def test_a_tokenizer_that_is_not_there_is_noticed_before_the_model_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match="--tokenizer takes"):
        export("org/Model-1.2B", tokenizer=str(tmp_path / name), out=tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("model", "form", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "gguf", "Llama-3.2-1B-f16.gguf"),
        ("meta-llama/Llama-3.2-1B", "vllm", "Llama-3.2-1B-vllm"),
        ("files/tiny.q8.gguf", "gguf", "tiny.q8-f16.gguf"),
    ],
)
def test_a_file_is_named_after_the_whole_name_of_its_model(model: str, form: str, name: str) -> None:
    assert module._target(model, form, None, None, False) == Path.cwd() / name


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    where = checkpoint(tiny("llama"), tmp_path)
    weights = Path(where) / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match=r"model\.safetensors.* is not the file that was written"):
        export(where)
    (Path(where) / "prunus.json").unlink()
    weights.write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        export(where)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_stood_there_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "model-f32.gguf"
    old.write_text("GGUF, old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        exported(tiny("llama"), tmp_path, overwrite=True)
    assert old.read_text() == "GGUF, old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model-f32.gguf"]


# ------------------------------------------------------------------------------------------------- the command line


def test_the_command_writes_the_file_and_says_what_it_is(tmp_path: Path) -> None:
    where = checkpoint(tiny("llama"), tmp_path)
    command = ["export", where, "--format", "gguf", "--quant", "q8_0", "--out", str(tmp_path / "a.gguf")]
    done = CliRunner().invoke(cli.app, [*command, "--json", str(tmp_path / "a.json")], prog_name="prunus")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["file"] == str(tmp_path / "a.gguf") and (tmp_path / "a.gguf").is_file()
    assert "architecture" in done.stdout and "stay in f16" in done.stderr  # rows of 48 and 80
    again = CliRunner().invoke(cli.app, command, prog_name="prunus")
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ") and "--overwrite" in again.stderr
    assert CliRunner().invoke(cli.app, [*command, "--overwrite"], prog_name="prunus").exit_code == 0


@pytest.mark.parametrize("arguments", [["--format", "mlx"], ["--format", "gguf", "--quant", "q2_k"], []])
def test_what_the_command_does_not_know(arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["export", str(tmp_path), *arguments], prog_name="prunus")
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@RUNTIME
def test_the_benchmark_measures_what_evaluate_does(tmp_path: Path) -> None:
    model = tiny("llama")
    dense = checkpoint(model, tmp_path / "dense")
    small = checkpoint(cut(model, ragged(model.config)), tmp_path / "small")
    text = tmp_path / "text.txt"
    text.write_text("the rain in the west is not what the others said it was\n" * 40)
    script = Path(__file__).parents[1] / "benchmarks" / "quantise.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "files"), "--text", str(text), "--length", "64"]
    command += ["--chunks", "3", "--prompt", "64", "--generate", "8", "--rounds", "2", "--quants", "f16", "q8_0"]
    command += ["--results", str(tmp_path / "q.json"), "--picture", str(tmp_path / "q"), f"dense={dense}", f"a={small}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "q.json").read_text())
    assert [(row["network"], row["quant"]) for row in results["rows"]] == [
        ("dense", "f16"), ("dense", "q8_0"), ("a", "f16"), ("a", "q8_0")
    ]  # fmt: skip
    for row in results["rows"]:
        assert abs(row["to_torch"]) < (1e-3 if row["quant"] == "f16" else 2e-2)
        assert row["pp"] > 0 and row["tg"] > 0
    assert results["rows"][0]["pp_ratio"] == results["rows"][0]["tg_ratio"] == 1
    assert str(tmp_path) not in results["command"]
    assert (tmp_path / "q.png").is_file()


def test_the_figures_are_finite(tmp_path: Path) -> None:
    found = exported(tiny("gpt2"), tmp_path, "f16")
    assert all(math.isfinite(v) for v in found.values() if isinstance(v, float))
