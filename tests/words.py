"""Tiny tokenizers of the two kinds that llama.cpp knows, for tiny models with `N_TOKENS` rows."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
