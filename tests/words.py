"""Tiny models with tokenizers of the two kinds that llama.cpp knows, saved as checkpoints, and what is read of GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny import CONFIGS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prunus.exporting import llamacpp
from prunus.models.checkpoint import save
from prunus.models.families import family_of
from prunus.models.slicing import extract
from prunus.subnetwork import SubNetwork

RUNTIME = pytest.mark.skipif(not llamacpp.installed(), reason="needs llama-cpp-python (the extra llama-cpp)")
N_TOKENS = 320
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "</s>")


def _fast(tokenizer: Tokenizer) -> Any:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast


def bytes_bpe(steps: list[Any] | None = None, **model: Any) -> Any:
    """BPE over bytes with 20 merges, as GPT-2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["Ġ t", "h e", "Ġ a", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "o u", "n d", "Ġ b", "i s"]
    pairs += ["1 2", "Ġ 1", "' t", "3 4", "Ġ Ġ"]
    merges = [(a, b) for a, _, b in (pair.partition(" ") for pair in pairs)]
    texts = [*SPECIAL, *letters, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(texts)}, merges=merges, **model))
    steps = steps or [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def split(pattern: str) -> list[Any]:
    """The steps of a pre-tokenizer that splits by a regular expression."""
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def sentencepiece_bpe(prefix: bool = True) -> Any:
    """BPE that falls back to bytes, as Llama 2's (prefix: a space before the text) or Gemma's."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzTDI0123456789.,'!"]
    merges = [("▁", "t"), ("h", "e"), ("▁", "a"), ("▁t", "he"), ("i", "n"), ("e", "r"), ("▁", "▁")]
    texts = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *letters, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(texts)}, merges=merges, byte_fallback=True, fuse_unk=True,
            unk_token="<unk>",
        )
    )  # fmt: skip
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _fast(tokenizer)


def tiny(name: str, **changes: Any) -> Any:
    """A tiny random model as in `tiny.py`, with rows for the tokens of `words.py` and room for the text."""
    raw = CONFIGS[name]().to_dict() | {"vocab_size": N_TOKENS, "max_position_embeddings": 256}
    raw |= {"n_positions": 256} if name == "gpt2" else {}
    raw |= {"qk_layernorm": False} if name == "phi" else {}
    config = type(CONFIGS[name]())(**(raw | changes))
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise
    return model


def cut(model: Any, sub: SubNetwork) -> Any:
    return extract(model, family_of(model.config), sub)


def checkpoint(model: Any, directory: Path, tokenizer: Any = None) -> str:
    save(model, tokenizer or bytes_bpe(), directory / "model", card="a card", manifest={})
    return str(directory / "model")


def fields(found: dict[str, Any]) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(found["file"]).fields.items()}
