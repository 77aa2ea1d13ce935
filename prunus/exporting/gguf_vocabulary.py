"""Floor 2: a tokenizer as a GGUF file holds it: tokens, merges or scores, special tokens, pre-tokenizer, chat template.

llama.cpp has its own tokenizers and knows ways of splitting text into words (pre-tokenizers) by name. The name is found
by what the tokenizer's own pre-tokenizer says, not guessed; whether both give the same tokens is tried on the file
(`prunus.exporting.export`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from prunus.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
_DIGITS, _GPT2 = "one digit at a time", "the words of GPT-2"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LETTERS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_LLAMA3 = rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}"
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = MappingProxyType(
    {  # (the steps of the pre-tokenizer, whether whole words come before merges) -> llama.cpp's name
        ((_GPT2,), False): "gpt-2",
        ((_DIGITS, _GPT2), False): "smollm",
        ((_LLAMA3,), True): "llama-bpe",
        ((_LLAMA3,), False): "dbrx",
        ((rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}",), False): "qwen2",
        ((rf"{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), True): "tekken",
    }
)
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers -> llama.cpp


@dataclass(frozen=True)
class Vocabulary:
    """Everything under `tokenizer.` in a GGUF file."""

    kind: Literal["gpt2", "llama"]  # BPE over bytes; SentencePiece's BPE
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)  # llama.cpp's name -> token
    flags: Mapping[str, bool] = field(default_factory=dict)  # add_bos_token, add_eos_token, add_space_prefix
    chat_template: str | None = None


def vocabulary(tokenizer: Any, n_tokens: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers, padded to the rows of the embedding.

    pre: llama.cpp's name of the pre-tokenizer, for one that is not known here. Raises UserError where it cannot be
    carried over.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"{type(tokenizer).__name__} has no tokenizer.json form", "save it as a fast tokenizer")
    raw = json.loads(backend.to_str())
    model = raw["model"]
    if model.get("type") != "BPE":
        raise _refused(
            f"its model is {model.get('type')}, and only BPE (over bytes, or SentencePiece's) is carried over",
            "take the tokenizer from a GGUF file of the original model with --tokenizer",
        )
    if _over_bytes(raw):
        found = pre or _pre_tokenizer(raw)
        tokens, types = _tokens(raw, n_tokens)
        kind: Literal["gpt2", "llama"] = "gpt2"
        merges: tuple[str, ...] = tuple(" ".join(_two(m)) for m in model["merges"])
        scores: tuple[float, ...] = ()
    elif model.get("byte_fallback"):
        kind, found, merges = "llama", pre or "default", ()
        tokens, types = _tokens(raw, n_tokens)
        scores = _scores(model, tokens)
    else:
        raise _refused(
            "its BPE works neither over bytes nor with a fall-back to bytes",
            "take the tokenizer from a GGUF file of the original model with --tokenizer",
        )
    return Vocabulary(
        kind, found, tokens, types, merges, scores, _special(tokenizer), _flags(tokenizer, kind), _template(tokenizer)
    )


def _refused(reason: str, advice: str) -> UserError:
    return UserError(f"the tokenizer cannot be carried over to GGUF: {reason}; {advice}")


def _steps(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    step = raw.get("pre_tokenizer")
    if step is None:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def _over_bytes(raw: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(raw))


def _pre_tokenizer(raw: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the text is split; raises UserError for a way that is not known here."""
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer["type"] not in ("NFC", "NFKC"):
        raise _refused(f"it changes the text first ({normalizer['type']})", "llama.cpp would not")
    steps = []
    for step in _steps(raw):
        if step["type"] == "Digits" and step.get("individual_digits"):
            steps.append(_DIGITS)
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            steps.append(str(step["pattern"]["Regex"]))
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            steps += [_GPT2] if step.get("use_regex", True) else []
        else:
            steps.append(json.dumps(step))
    name = PRE_TOKENIZERS.get((tuple(steps), bool(raw["model"].get("ignore_merges"))))
    if name is None:
        raise _refused(
            f"llama.cpp's name for its pre-tokenizer is not known here ({'; '.join(steps) or 'none'})",
            "name it with --pre-tokenizer, or take the tokenizer from a GGUF file with --tokenizer",
        )
    return name


def _two(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _tokens(raw: Mapping[str, Any], n_tokens: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and types of all tokens; numbers that the tokenizer does not use are padding."""
    model = raw["model"]
    texts = {i: text for text, i in model["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    sentencepiece = not _over_bytes(raw)
    if sentencepiece:
        types |= {i: BYTE for i, text in texts.items() if len(text) == 6 and text.startswith("<0x") and text[-1] == ">"}
    for added in raw.get("added_tokens") or ():
        content, i = str(added["content"]), int(added["id"])
        types[i] = CONTROL if added["special"] else USER_DEFINED
        texts[i] = content if added["special"] else content.replace("▁", " ")
    if sentencepiece and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    if texts and max(texts) >= n_tokens:
        raise _refused(
            f"it has token {max(texts)}, and the model's embedding has {n_tokens} rows", "use the model's own tokenizer"
        )
    return (
        tuple(texts.get(i, f"[PAD{i}]") for i in range(n_tokens)),
        tuple(types.get(i, UNUSED) for i in range(n_tokens)),
    )


def _scores(model: Mapping[str, Any], tokens: tuple[str, ...]) -> tuple[float, ...]:
    """Scores by which SentencePiece merges in the order of the merges: minus the rank of the first that makes it."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault("".join(_two(merge)), i)
    last = float(len(rank) + 1)
    return tuple(-float(rank.get(token, last)) for token in tokens)


def _special(tokenizer: Any) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{ours}_token_id", None) for ours, name in SPECIAL.items()}
    return {name: int(i) for name, i in found.items() if i is not None}


def _flags(tokenizer: Any, kind: str) -> dict[str, bool]:
    """What the tokenizer adds by itself, found by asking it."""
    ids = list(tokenizer("a")["input_ids"])
    flags = {
        "add_bos_token": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }
    if kind == "llama":
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        flags["add_space_prefix"] = str(tokenizer.convert_ids_to_tokens(plain[0])).startswith("▁")
    return flags


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


# ----------------------------------------------------------------------------------------------- in and out of a file


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add it to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    for name, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for name, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def is_gguf(path: Path) -> bool:
    """True if a file begins as GGUF files do."""
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def check_tokenizer(path: Path) -> None:
    """Raise UserError where a file that a tokenizer is to be taken from is not there, or is no GGUF file."""
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}; --tokenizer takes a GGUF file")
    if not is_gguf(path):
        raise UserError(f"{str(path)!r} is no GGUF file; --tokenizer takes the tokenizer of one")


def copy_vocabulary(writer: Any, path: Path, n_tokens: int) -> str:
    """Add the vocabulary of another GGUF file as it stands there, and return its pre-tokenizer's name.

    Raises UserError where the file cannot be read, or has another number of tokens than the embedding has rows.
    """
    import gguf

    check_tokenizer(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: one for name, one in reader.fields.items() if name.startswith("tokenizer.")}
        n_found = len(fields["tokenizer.ggml.tokens"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"no tokenizer can be read from {str(path)!r} ({error}); --tokenizer takes a GGUF file"
        ) from error
    if n_found != n_tokens:
        raise UserError(
            f"the tokenizer of {str(path)!r} has {n_found} tokens, and the model's embedding has {n_tokens} rows; take "
            "a GGUF file of the model that was compressed"
        )
    for name, one in fields.items():
        of = one.types[1] if one.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, one.contents(), one.types[0], sub_type=of)
    pre = fields.get("tokenizer.ggml.pre")
    return str(pre.contents()) if pre else "default"
