"""Floor 2: text becomes calibration tokens. Data sets, files, or samples of the model itself; never test text."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prunus.errors import UserError
from prunus.progress import Tally
from prunus.recording.artefact import fingerprint
from prunus.texts.sampling import check_length, generated_windows

Join = Literal["auto", "rows", "raw"]


DATASETS: Mapping[str, tuple[str, str]] = {  # name -> (hub id, configuration); always the training split
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
JSONL = (".jsonl", ".ndjson")
GENERATED = ("generated", "generated:chat")
ALTERNATIVES = 'give a .txt or .jsonl file, or "generated" (the model\'s own samples, which need no data)'
SHARED = 0.05  # of a calibration text's runs of tokens, that a test text may hold
CHARACTERS_PER_TOKEN = 64  # longer texts (per token needed) are thinned out before they are tokenised


def calibration_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    column: str | None = None,
    allow_test: bool = False,
    join: Join = "auto",
    bos: bool | None = None,
    progress: Tally | None = None,
) -> Tensor:
    """Token windows to calibrate on, the same for the same arguments.

    source: "wikitext2", "c4", a .jsonl file, any other text file, "generated" or "generated:chat" (both need `model`),
    or a mixture such as "wikitext2:0.7,notes.txt:0.3".
    Shape: (samples, length), int64, on the CPU. Windows never share a token. They come in the order of the text (the
    documents of a jsonl file are shuffled first), so the last windows are a part of the text of their own: see `split`.
    column: the jsonl column that holds the text (default "text"). bos: start every window with the BOS token; None does
    so only for tokenizers whose models break without it (`needs_bos`).
    Raises UserError for a text that is missing, empty, too short, binary or named as test text, and for a hub that
    cannot be reached, and for windows longer than the positions of `model`. Mutates nothing.
    """
    if samples < 1 or length < 2:
        raise UserError(f"calibration needs samples >= 1 and length >= 2; given {samples} windows of {length} tokens")
    if model is not None:
        check_length(model, length)
    parts = mixture(source, samples)
    if len(parts) > 1:
        draws = [
            calibration_tokens(
                name, tokenizer, samples=n, length=length, seed=seed + i, model=model, device=device, column=column,
                allow_test=allow_test, join=join, bos=bos, progress=progress,
            )
            for i, (name, n) in enumerate(parts)
        ]  # fmt: skip
        return _interleave(draws)
    name = parts[0][0]
    start = tokenizer.bos_token_id if (needs_bos(tokenizer) if bos is None else bos) else None
    if name in GENERATED:
        if model is None:
            raise UserError(f'calibration "{name}" samples from the model, but no model was given; pass model=')
        ids = generated_windows(
            model, tokenizer, samples=samples, length=length, seed=seed, device=device,
            chat=name.endswith(":chat"), bos=start, progress=progress,
        )  # fmt: skip
    else:
        text = source_text(name, seed=seed, column=column, need=samples * length, allow_test=allow_test, join=join)
        text = _thin(text, samples * length, seed)
        stream = encode(text, tokenizer, special=False)
        ids = windows(stream, samples, length - (start is not None), seed, name)
        if start is not None:
            ids = torch.cat([torch.full((samples, 1), int(start)), ids], 1)
    _check_vocabulary(ids, model)
    return ids


def check(source: str, samples: int, *, column: str | None = None) -> None:
    """Raise UserError for a file that cannot be calibration text; hubs, and what only tokens tell, are left."""
    for name, _ in mixture(source, samples):
        if name not in (*DATASETS, *GENERATED, "auto"):
            source_text(name, seed=0, column=column, need=0)


def files_of(source: str) -> list[Path]:
    """The files that a source names; none for data sets and the model's own samples."""
    return [Path(name) for name, _ in mixture(source, 10**9) if Path(name).is_file()]


def hashes(source: str) -> list[str]:
    """SHA-256 of each file that a source names."""
    return [one["sha256"] for file in files_of(source) for one in fingerprint(file).values()]


def mixture(source: str, samples: int) -> list[tuple[str, int]]:
    """The sources named in `source` and how many windows each gives; the numbers add up to `samples`."""
    if "," not in source or Path(source).is_file():
        return [(source, samples)]
    names, weights = [], []
    for part in source.split(","):
        name, colon, tail = part.strip().rpartition(":")
        try:
            weight = float(tail) if colon else 1.0
        except ValueError:
            name, weight = part.strip(), 1.0
        names.append(name if colon and name else part.strip())
        weights.append(weight)
    if not all(names) or any(not 0 < w < float("inf") for w in weights):
        raise UserError(f'a mixture reads "wikitext2:0.7,notes.txt:0.3" with positive weights; given "{source}"')
    exact = [samples * w / sum(weights) for w in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise UserError(
            f'"{source}" gives {names[counts.index(0)]} none of {samples} windows; ask for more windows or drop it'
        )
    return list(zip(names, counts, strict=True))


def _interleave(draws: Sequence[Tensor]) -> Tensor:
    """Windows of several sources merged evenly, each source in its own order."""
    rank = [((i + 0.5) / len(d), k, i) for k, d in enumerate(draws) for i in range(len(d))]
    return torch.stack([draws[k][i] for _, k, i in sorted(rank)])


def needs_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True for Gemma's tokenizers: those models predict nearly at random where a text does not start with BOS."""
    return str(tokenizer.bos_token) == "<bos>"


def auto_source() -> str:
    """ "wikitext2" where a hub answers, "generated" where none does (or where HF_HUB_OFFLINE is set), or where the
    package that reads it is missing (`prunus[hub]`).
    """
    from huggingface_hub import HfApi, constants

    if importlib.util.find_spec("datasets") is None:
        return "generated"
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "generated"
    try:
        HfApi().dataset_info(DATASETS["wikitext2"][0], timeout=5)
    except Exception:  # whatever the reason is, the data set cannot be had
        return "generated"
    return "wikitext2"


# ------------------------------------------------------------------------------------------------------------ text


def source_text(
    name: str, *, seed: int, column: str | None, need: int, allow_test: bool = False, join: Join = "auto"
) -> str:
    """The text of one source: a data set of the hub or a file."""
    if name in DATASETS:
        return _hub_text(name, seed, need)
    path = Path(name)
    if not path.exists() and path.suffix == "" and os.sep not in name:
        known = ", ".join([*DATASETS, *GENERATED])
        raise UserError(f'unknown calibration source "{name}": neither a file nor one of {known}')
    if not allow_test and re.search(r"(?<![a-z])test(s|set|ing|data)?(?![a-z])", path.name.lower()):
        raise UserError(
            f"{path.name} is named as test text; calibrating on it would make every figure measured on it worthless; "
            "use training or validation text, or give the file another name if this one misleads"
        )
    return file_text(path, column=column, seed=seed, join=join)


def file_text(path: Path | str, *, column: str | None = None, seed: int | None = None, join: Join = "auto") -> str:
    """The text of a file: documents of a .jsonl joined by a blank line, anything else as `join` says.

    join: "raw" takes a text as it is. "rows" is how WikiText is scored everywhere: its rows (one per line, with their
    line break; blank ones empty) joined by a blank line. "auto" takes "rows" for WikiText (it has its markers), else
    "raw". seed: shuffles the documents of a .jsonl.
    """
    path = Path(path)
    text = _read(path)
    if path.suffix.lower() in JSONL:
        documents = _documents(text, path, column or "text")
        if seed is not None:
            random.Random(seed).shuffle(documents)
        return "\n\n".join(documents)
    if column is not None:
        raise UserError(f"a column ({column}) can be chosen in .jsonl files only; {path.name} is plain text")
    if join == "rows" or (join == "auto" and is_wikitext(text)):
        return "\n\n".join(rows_of(text))
    return text


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the text file {path}: {error.strerror or error}; give another") from error
    if b"\0" in raw:
        raise UserError(f"{path} is a binary file (it contains NUL bytes), not text; give a .txt or .jsonl file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} of {len(raw)}); convert it to UTF-8, or give another"
        ) from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with text")
    return text.replace("\r\n", "\n")


def _documents(text: str, path: Path, column: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); a .jsonl has one object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            found = ", ".join(k for k, v in row.items() if isinstance(v, str)) if isinstance(row, dict) else "none"
            raise UserError(
                f'{path}, line {number}: no text in column "{column}"; its text columns are: {found or "none"}'
            )
        if row[column].strip():
            documents.append(row[column])
    if not documents:
        raise UserError(f'{path} has no text in column "{column}"; name another with --column')
    return documents


def column_in(path: Path | str, column: str | None) -> str | None:
    """The column, if a .jsonl file has it in its first row; None for plain text and for files without it.

    Test text has the calibration text's column where it can: the two may be files of different kinds.
    """
    path = Path(path)
    if column is None or path.suffix.lower() not in JSONL:
        return None
    try:
        row = json.loads(next((line for line in _read(path).split("\n") if line.strip()), ""))
    except (ValueError, RecursionError):
        return None  # which the reading of the text says
    return column if isinstance(row, dict) and column in row else None


def is_wikitext(text: str) -> bool:
    """True if a text carries WikiText's markers: spaced headings with `@-@` or `@,@` inside words and numbers."""
    head = text[:200_000]
    return bool(re.search(r" @[-,.]@ ", head)) and bool(re.search(r"^ (= )+.* = $", head, re.MULTILINE))


def rows_of(text: str) -> list[str]:
    """WikiText's rows as the hub's data set holds them: one per line, line break kept, blank lines as ''."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line + "\n" if line.strip() else "" for line in lines]


def _hub_text(name: str, seed: int, need: int) -> str:
    hub_id, configuration = DATASETS[name]
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'"{name}" needs the package `datasets` (pip install datasets); or {ALTERNATIVES}') from error
    try:
        if name == "wikitext2":
            rows: Iterable[str] = datasets.load_dataset(hub_id, configuration, split="train")["text"]
            return "\n\n".join(rows)
        stream = datasets.load_dataset(hub_id, configuration, split="train", streaming=True)
        return "\n\n".join(_enough(stream.shuffle(seed=seed, buffer_size=1000), 8 * need))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise UserError(f'cannot load "{name}" ({hub_id}) from the hub ({reason[:200]}); {ALTERNATIVES}') from error


def _enough(stream: Iterable[Mapping[str, Any]], characters: int) -> list[str]:
    """Documents of a stream until they hold this many characters."""
    documents, held = [], 0
    for row in stream:
        documents.append(str(row["text"]))
        held += len(documents[-1])
        if held >= characters:
            break
    return documents


def _thin(text: str, need: int, seed: int) -> str:
    """A text far longer than needed becomes random sections of it, in order, so that tokenising takes seconds."""
    sections, size = 64, CHARACTERS_PER_TOKEN * need // 64
    if len(text) <= 2 * sections * size:
        return text
    starts = _starts(len(text), sections, size, seed)
    return "\n\n".join(text[s : s + size] for s in starts)


# ---------------------------------------------------------------------------------------------------------- tokens


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> Tensor:
    """One long stream of token ids, shape (n,), int64; special: let the tokenizer add its BOS in front."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def windows(stream: Tensor, samples: int, length: int, seed: int, name: str = "the text") -> Tensor:
    """Random windows that do not overlap, in the order of the text: (samples, length) from a stream (n,).

    Every placement of the windows is equally likely.
    """
    need = samples * length
    if len(stream) < need:
        raise UserError(
            f"{name} is too short: {samples} windows of {length} tokens need {need:,} tokens, it has {len(stream):,}; "
            "ask for fewer or shorter windows, or give more text"
        )
    starts = torch.tensor(_starts(len(stream), samples, length, seed))
    return stream[starts[:, None] + torch.arange(length)].clone()


def _starts(n: int, pieces: int, size: int, seed: int) -> list[int]:
    """Sorted random starts of pieces that do not overlap inside n places."""
    rng = random.Random(seed)
    offsets = sorted(rng.randint(0, n - pieces * size) for _ in range(pieces))
    return [offset + i * size for i, offset in enumerate(offsets)]


def _check_vocabulary(ids: Tensor, model: nn.Module | None) -> None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and int(ids.max()) >= size:
        raise UserError(
            f"the tokenizer gives token {int(ids.max())}, but the model knows {size} tokens; "
            "they do not belong together: give the model's own tokenizer"
        )


def split(ids: Tensor, holdout: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Calibration windows (shuffled) and `holdout` held-out windows: the last ones, a part of the text of their own.

    Shapes: (n - holdout, length) and (holdout, length). The seam may run through one document, no more.
    """
    n = len(ids) - holdout
    if holdout < 0 or n < 1:
        raise UserError(f"cannot hold out {holdout} of {len(ids)} windows; leave at least one to calibrate on")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return ids[:n][order], ids[n:].clone()


def openings(ids: Tensor, n: int, *, seed: int = 0, bos: int | None = None) -> Tensor | None:
    """n tokens that a text may begin with, drawn from calibration windows (rows, length); shape (n, 1), or None.

    The first token of a sequence becomes the attention sink of all others: a few layers blow its state up, whatever
    token it is (Xiao et al. 2024, arXiv:2309.17453). What comes first depends on nothing else, and so costs one token
    to fit; a few dozen windows show a few dozen first tokens, and a refit on them alone breaks the sink of others.
    One in 16 is `bos`, which chats begin with. None where all windows begin alike: such a model sees one opening only.
    """
    if not n or bool((ids[:, 0] == ids[0, 0]).all()):
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = ids.flatten()[torch.randint(ids.numel(), (n,), generator=generator).to(ids.device)]
    if bos is not None:
        drawn[::16] = bos
    return drawn[:, None]


def token_hash(ids: Tensor) -> str:
    """Name of a token tensor: sha256 of its int64 little-endian bytes and its shape (64 hexadecimal digits)."""
    raw = ids.detach().cpu().contiguous().to(torch.int64).numpy().astype("<i8")
    return hashlib.sha256(raw.tobytes() + repr(tuple(ids.shape)).encode()).hexdigest()


def overlap(ids: Tensor, other: Tensor, n: int = 32) -> float:
    """Share of the n-grams of `other` that occur in `ids`: 0 where calibration and test text have nothing in common.

    Both are streams (length,) or windows (samples, length); n-grams do not cross windows.
    """
    seen = set(_ngrams(ids, n))
    grams = _ngrams(other, n)
    return sum(g in seen for g in grams) / len(grams) if grams else 0.0


def refuse_seen(ids: Tensor, test: Tensor, name: str) -> None:
    """Raise UserError where a test text (a stream) holds calibration windows (samples, length): a copy under another
    name, or a file that both were taken from. Boilerplate that two texts share stays below `SHARED`."""
    if (share := overlap(test, ids)) > SHARED:
        raise UserError(
            f"{share:.0%} of the calibration text stands in the test text {name!r} too, counted in runs of 32 tokens, "
            "so figures on it would mean nothing; give another text to one of the two"
        )


def _ngrams(ids: Tensor, n: int) -> list[bytes]:
    rows = (ids if ids.ndim == 2 else ids[None]).cpu().to(torch.int32).contiguous().numpy()
    width = rows.itemsize
    raw = [row.tobytes() for row in rows]
    return [
        hashlib.blake2b(r[i : i + n * width], digest_size=8).digest()
        for r in raw
        for i in range(0, len(r) - n * width + 1, width)
    ]


__all__ = [
    "DATASETS",
    "auto_source",
    "calibration_tokens",
    "check",
    "column_in",
    "encode",
    "file_text",
    "files_of",
    "hashes",
    "mixture",
    "needs_bos",
    "overlap",
    "refuse_seen",
    "split",
    "token_hash",
    "windows",
]
