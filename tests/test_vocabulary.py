"""A tokenizer in a GGUF file gives the same tokens, or is refused with what to do; nothing about it is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from words import N_TOKENS, RUNTIME, SPECIAL, bytes_bpe, checkpoint, fields, sentencepiece_bpe, split, tiny

from prunus.errors import UserError
from prunus.exporting.export import TEXT, export
from prunus.exporting.gguf_vocabulary import PRE_TOKENIZERS, vocabulary

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
TOKENIZERS: dict[str, Any] = {
    "gpt-2": bytes_bpe,
    "smollm": lambda: bytes_bpe([DIGITS, BYTES]),
    "llama-bpe": lambda: bytes_bpe(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: bytes_bpe(split(LLAMA3)),
    "qwen2": lambda: bytes_bpe(split(QWEN2)),
    "default": sentencepiece_bpe,
}


@pytest.mark.parametrize("pre", TOKENIZERS)
def test_the_pre_tokenizer_is_recognised_by_what_it_says(pre: str) -> None:
    assert vocabulary(TOKENIZERS[pre](), N_TOKENS).pre == pre


def test_every_known_pre_tokenizer_has_one_name() -> None:
    assert len(set(PRE_TOKENIZERS.values())) == len(PRE_TOKENIZERS)
    assert {"gpt-2", "smollm", "llama-bpe", "qwen2"} < set(PRE_TOKENIZERS.values())


@RUNTIME
@pytest.mark.parametrize("pre", TOKENIZERS)
def test_llama_cpp_gives_the_same_tokens(pre: str, tmp_path: Path) -> None:
    found = export(checkpoint(tiny("llama"), tmp_path, TOKENIZERS[pre]()), quant="f32")  # refused where they differ
    assert found["notes"] == []
    assert fields(found)["tokenizer.ggml.pre"] == pre


@RUNTIME
@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_before_the_text_as_the_tokenizer_has_it(prefix: bool, tmp_path: Path) -> None:
    found = export(checkpoint(tiny("llama"), tmp_path, sentencepiece_bpe(prefix)), quant="f32")
    assert fields(found)["tokenizer.ggml.add_space_prefix"] == prefix


def test_tokens_have_their_types() -> None:
    words = vocabulary(sentencepiece_bpe(), N_TOKENS)
    assert words.tokens[:4] == (*SPECIAL, "<0x00>")
    assert words.types[:4] == (2, 3, 3, 6)
    assert words.tokens[-1] == f"[PAD{N_TOKENS - 1}]" and words.types[-1] == 5
    assert words.scores[words.tokens.index("▁t")] > words.scores[words.tokens.index("he")] > words.scores[-1]
    assert dict(words.special) == {"bos": 1, "eos": 2, "unknown": 0, "padding": 0}
    over_bytes = vocabulary(bytes_bpe(), N_TOKENS)
    assert over_bytes.merges[0] == "Ġ t" and over_bytes.kind == "gpt2" and not over_bytes.scores


def test_what_the_tokenizer_adds_by_itself() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = bytes_bpe()
    assert vocabulary(tokenizer, N_TOKENS).flags == {"add_bos_token": False, "add_eos_token": False}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert vocabulary(tokenizer, N_TOKENS).flags == {"add_bos_token": True, "add_eos_token": False}


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match=r"pre-tokenizer is not known.*--pre-tokenizer"):
        vocabulary(bytes_bpe(split(r"\w+|\W+")), N_TOKENS)
    assert vocabulary(bytes_bpe(split(r"\w+|\W+")), N_TOKENS, "gpt-2").pre == "gpt-2"
    with pytest.raises(UserError, match=r"token 278, and the model's embedding has 100 rows"):
        vocabulary(bytes_bpe(), 100)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(UserError, match="its model is Unigram"):
        vocabulary(unigram, N_TOKENS)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match="neither over bytes nor"):
        vocabulary(plain, N_TOKENS)


@RUNTIME
def test_other_tokens_are_refused_unless_named_by_hand(tmp_path: Path) -> None:
    where = checkpoint(tiny("llama"), tmp_path, bytes_bpe(split(r"\w+|\W+")))
    with pytest.raises(UserError, match="not known"):
        export(where)
    found = export(where, pre_tokenizer="gpt-2")
    assert any("named by hand" in note for note in found["notes"])
    odd = json.loads((Path(where) / "tokenizer.json").read_text())
    odd["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    odd["model"]["merges"] = odd["model"]["merges"][::-1]  # known by name, but an added token splits differently
    odd["added_tokens"].append({**odd["added_tokens"][-1], "id": 277, "content": "the", "single_word": True})
    (Path(where) / "tokenizer.json").write_text(json.dumps(odd))
    (Path(where) / "prunus.json").unlink()
    with pytest.raises(UserError, match="tokens of a text differ"):
        export(where, out=tmp_path / "odd.gguf")


@RUNTIME
def test_a_name_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load the file .*unknown pre-tokenizer type: 'nonsense'"):
        export(checkpoint(tiny("llama"), tmp_path), pre_tokenizer="nonsense")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@RUNTIME
def test_the_tokenizer_of_a_gguf_file_is_copied_as_it_stands(tmp_path: Path) -> None:
    smollm = export(checkpoint(tiny("llama"), tmp_path, TOKENIZERS["smollm"]()), quant="f32", out=tmp_path / "a.gguf")
    plain = checkpoint(tiny("llama"), tmp_path / "plain")
    copied = export(plain, quant="f32", tokenizer=smollm["file"])
    ours, theirs = fields(copied), fields(smollm)
    names = [name for name in theirs if name.startswith("tokenizer.")]
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert ours["tokenizer.ggml.pre"] == "smollm"
    assert any("named by hand" in note for note in copied["notes"])  # "1987" is one word no more


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    where = checkpoint(tiny("llama"), tmp_path)
    with pytest.raises(UserError, match=r"config\.json' is no GGUF file; --tokenizer takes"):
        export(where, tokenizer=str(Path(where) / "config.json"))
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_token_list(["a", "b"])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match=r"has 2 tokens, and the model's embedding has 320 rows"):
        export(where, tokenizer=str(other))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other.gguf"]


def test_the_text_that_is_tried_has_what_tokenizers_stumble_over() -> None:
    assert any(letter.isdigit() for letter in TEXT)
    for piece in ("'t", "\n\n", "   ", "\t", "é", "日", "🙂", " (", '"'):
        assert piece in TEXT
