"""Floor 3: what a model is worth: perplexity, divergence from another model, sizes, and speed on this device."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prunus.errors import UserError
from prunus.progress import Tally
from prunus.texts.calibration import Join, encode, file_text, needs_bos
from prunus.texts.sampling import check_length

Logits = Callable[[int, int], Tensor]  # (first position, end) -> logits (batch, end - first, vocab)

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # tokens in one forward
PIECE = {"cpu": 2**24, "cuda": 2**27}  # numbers in one fp32 piece of logits
TURNS = 5  # of a measurement of speed at least
PATIENCE = 8.0  # seconds that a measurement of speed may take for more turns than it must
MOST_TURNS = 25


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on chunks of a text."""

    ppl: float  # exp(nats)
    nats: float  # mean negative log-likelihood per predicted token
    n_tokens: int  # predicted tokens: length - 1 in every chunk
    se: float | None  # standard error of `nats` over chunks; None where there is one chunk
    per_chunk: tuple[float, ...]  # nats of each chunk


@dataclass(frozen=True)
class KL:
    """Divergence of a model from a reference, KL(reference || model), with the perplexities of both."""

    mean_nats: float  # per predicted token
    se: float | None  # standard error over chunks
    n_tokens: int
    per_chunk: tuple[float, ...]
    agreement: float  # share of positions where both have the same most likely token
    model: Perplexity
    reference: Perplexity


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class SpeedRatio:
    """How many times faster the small model is: medians of ratios of neighbouring runs."""

    prefill: float
    decode: float
    dense: Speed
    small: Speed


# --------------------------------------------------------------------------------------------- perplexity, divergence


def text_ids(
    path: Path | str, tokenizer: PreTrainedTokenizerBase, *, join: Join = "auto", column: str | None = None
) -> Tensor:
    """One long stream of tokens, shape (n,), int64; the tokenizer's own BOS, if it adds one, stands at its start.

    join: see `prunus.texts.calibration.file_text`; "auto" reads WikiText as it is scored everywhere, other text as
    it is.
    Raises UserError for a file that is missing, empty or binary.
    """
    return encode(file_text(path, join=join, column=column), tokenizer, special=not needs_bos(tokenizer))


def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    length: int = 2048,
    chunks: int | None = None,
    bos: bool | None = None,
    progress: Tally | None = None,
) -> Perplexity:
    """Perplexity on the first `chunks` chunks (None: all) of `length` tokens of a stream (n,); chunks do not overlap.

    In every chunk all tokens but the first are predicted from those before them in the chunk.
    bos: start every chunk with BOS (it is one of the `length` tokens); None does so for Gemma only.
    Raises UserError where the text is shorter than asked, a chunk longer than the model's positions, or the model
    gives NaN. The model is put into evaluation mode for the time of the call.
    """
    text = chunked(model, ids, length, chunks, bos)
    nats = [row[0] for row in _scan([model], text, progress)]
    return _perplexity(nats, length)


def kl_divergence(
    model: nn.Module,
    reference: nn.Module,
    ids: Tensor,
    *,
    length: int = 2048,
    chunks: int | None = None,
    bos: bool | None = None,
    progress: Tally | None = None,
) -> KL:
    """KL(reference || model) per predicted token on the chunks that `perplexity` scores, in fp32 piece by piece.

    Raises what `perplexity` raises, and UserError where the two models do not share one vocabulary.
    """
    text = chunked(model, ids, length, chunks, bos)
    check_length(reference, length)
    sizes = [getattr(m.config, "vocab_size", None) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(f"the models know {sizes[0]} and {sizes[1]} tokens; a divergence needs one vocabulary")
    scanned = list(_scan([model, reference], text, progress))
    nats = [row[2] for row in scanned]
    return KL(
        mean_nats=statistics.fmean(nats),
        se=_standard_error(nats),
        n_tokens=len(nats) * (length - 1),
        per_chunk=tuple(nats),
        agreement=statistics.fmean(row[3] for row in scanned),
        model=_perplexity([row[0] for row in scanned], length),
        reference=_perplexity([row[1] for row in scanned], length),
    )


def chunked(model: nn.Module, ids: Tensor, length: int, chunks: int | None, bos: bool | None = None) -> Tensor:
    """The chunks to score, (chunks, length), after every check that needs no forward."""
    config: Any = model.config
    check_length(model, length)
    if length < 2 or (chunks is not None and chunks < 1):
        raise UserError(f"perplexity needs length >= 2 and chunks >= 1; given length {length}, chunks {chunks}")
    if bos is None:
        bos = str(getattr(config, "model_type", "")).startswith("gemma")
    width, available = length - bos, len(ids) // (length - bos)
    if available < (chunks or 1):
        raise UserError(
            f"the text is too short: {chunks or 1} chunks of {length} tokens need {(chunks or 1) * width:,} tokens, it "
            f"has {len(ids):,}; give more text, fewer chunks or a shorter length"
        )
    n = chunks or available
    text = ids[: n * width].view(n, width)
    if int(text.max()) >= config.vocab_size:
        raise UserError(
            f"the text has token {int(text.max())}, but the model knows {config.vocab_size} tokens; "
            "tokenise it with the model's own tokenizer"
        )
    return torch.cat([torch.full((n, 1), int(config.bos_token_id)), text], 1) if bos else text


def _scan(models: Sequence[nn.Module], text: Tensor, progress: Tally | None) -> Iterator[list[float]]:
    """Per chunk: nats of every model and, for two models, KL(second || first) and the share of equal top tokens."""
    device = next(models[0].parameters()).device
    batch = max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) // text.shape[1])
    training = [m.training for m in models]
    for m in models:
        m.eval()
    try:
        with torch.inference_mode():
            readers = [_reader(m, text[:1, :8]) for m in models]
            done = 0
            for part in text.split(batch):  # type: ignore[no-untyped-call]
                found = _score([read(part) for read in readers], part, device)
                if not torch.isfinite(found).all():
                    raise UserError(
                        f"the model gives NaN or infinity in chunk {done + 1}; check its weights, or use bfloat16 or "
                        "float32 instead of float16"
                    )
                done += len(part)
                if progress is not None:
                    progress(done, len(text))
                yield from found.tolist()
    finally:
        for m, mode in zip(models, training, strict=True):
            m.train(mode)


def _score(logits: Sequence[Logits], ids: Tensor, device: torch.device) -> Tensor:
    """Rows of `_scan` for one batch of chunks (batch, length), averaged over positions."""
    batch, length = ids.shape
    total = torch.zeros((batch, len(logits) if len(logits) == 1 else 4), dtype=torch.float64)
    vocabulary = logits[0](0, 1).shape[-1]
    piece = max(1, PIECE.get(device.type, PIECE["cpu"]) // (batch * vocabulary))
    for first in range(0, length - 1, piece):
        end = min(first + piece, length - 1)
        target = ids[:, first + 1 : end + 1, None]
        log_p = [F.log_softmax(read(first, end).float(), -1) for read in logits]
        columns = [-p.gather(-1, target.to(p.device))[..., 0] for p in log_p]
        if len(log_p) == 2:
            q, p = log_p[0], log_p[1].to(log_p[0].device)
            columns.append((p.exp() * (p - q)).sum(-1))
            columns.append((p.argmax(-1) == q.argmax(-1)).float())
        total += torch.stack([c.double().sum(1).cpu() for c in columns], 1)
    return total / (length - 1)


def _reader(model: nn.Module, probe: Tensor) -> Callable[[Tensor], Logits]:
    """Logits of chunks, computed from hidden states for few positions at a time so that they never exist as a whole.

    Where a model's logits are not its head on its last hidden state (seen on `probe`), they are computed at once.
    """
    device = next(model.parameters()).device
    body, head = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", lambda: None)()
    cap = getattr(model.config, "final_logit_softcapping", None)

    def whole(ids: Tensor) -> Logits:
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
        return lambda first, end: logits[:, first:end]

    def pieces(ids: Tensor) -> Logits:
        assert body is not None and head is not None
        hidden: Tensor = body(input_ids=ids.to(device), use_cache=False).last_hidden_state

        def read(first: int, end: int) -> Tensor:
            logits: Tensor = head(hidden[:, first:end])
            return torch.tanh(logits / cap) * cap if cap else logits

        return read

    if body is None or head is None or body is model:
        return whole
    if not hasattr(body(input_ids=probe.to(device), use_cache=False), "last_hidden_state"):
        return whole
    n = probe.shape[1]
    one, other = whole(probe)(0, n).float(), pieces(probe)(0, n).float()
    same = one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-2, equal_nan=True)
    return pieces if same else whole


def _perplexity(nats: Sequence[float], length: int) -> Perplexity:
    mean = statistics.fmean(nats)
    ppl = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(ppl, mean, len(nats) * (length - 1), _standard_error(nats), tuple(nats))


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# -------------------------------------------------------------------------------------------------------------- speed


def measure_speed(model: nn.Module, *, prompt: int = 256, batch: int = 1, generate: int = 16) -> Speed:
    """Tokens per second of one model on its device: a prompt of `prompt` tokens, then decoding with a cache."""
    runs = _timed([model], prompt, batch, generate)
    return _speed([run[0] for run in runs], prompt, batch, generate)


def compare_speed(
    dense: nn.Module, small: nn.Module, *, prompt: int = 256, batch: int = 1, generate: int = 16
) -> SpeedRatio:
    """How many times faster `small` is than `dense`, run in turns so that other load on the device falls on both."""
    runs = _timed([dense, small], prompt, batch, generate)
    ratios = [[a / b for a, b in zip(run[0], run[1], strict=True)] for run in runs]
    return SpeedRatio(
        prefill=statistics.median(r[0] for r in ratios),
        decode=statistics.median(r[1] for r in ratios),
        dense=_speed([run[0] for run in runs], prompt, batch, generate),
        small=_speed([run[1] for run in runs], prompt, batch, generate),
    )


def shapes(model: nn.Module) -> str:
    """A name (16 hexadecimal digits) that networks share which do the same work for a token: those of one class and
    type with the same shapes in their layers, in whatever order the layers stand."""
    found = sorted((re.sub(r"\.\d+\.", ".", name, count=1), tuple(p.shape)) for name, p in model.named_parameters())
    return hashlib.sha256(repr((type(model).__name__, str(model.dtype), found)).encode()).hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """A name (16 hexadecimal digits) of a network's class and weights, the same where both are equal to the bit."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, p in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _speed(seconds: Sequence[tuple[float, float]], prompt: int, batch: int, generate: int) -> Speed:
    prefill, decode = (statistics.median(column) for column in zip(*seconds, strict=True))
    return Speed(prefill=batch * prompt / prefill, decode=batch * generate / decode)


def _timed(models: Sequence[nn.Module], prompt: int, batch: int, generate: int) -> list[list[tuple[float, float]]]:
    """Seconds (prefill, decoding) of every model in every turn; a prompt and one step before them warm up.

    `TURNS` turns, and while that took less than `PATIENCE` seconds more of them, at most `MOST_TURNS`: the shorter a
    turn, the more another process on the device disturbs it.
    """
    for model in models:
        check_length(model, prompt + generate)
    vocabulary = min(int(getattr(m.config, "vocab_size", 2)) for m in models)
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    for model in models:
        _once(model, ids, 1)
    runs: list[list[tuple[float, float]]] = []
    start = time.perf_counter()
    while len(runs) < TURNS or (len(runs) < MOST_TURNS and time.perf_counter() - start < PATIENCE):
        runs.append([_once(m, ids, generate) for m in models])
    return runs


@torch.inference_mode()
def _once(model: nn.Module, ids: Tensor, generate: int) -> tuple[float, float]:
    device = next(model.parameters()).device
    ids, training = ids.to(device), model.training
    model.eval()
    try:
        start = _now(device)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        middle = _now(device)
        for _ in range(generate):
            step = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        end = _now(device)
    finally:
        model.train(training)
    return middle - start, end - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --------------------------------------------------------------------------------------------------------- everything


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: Path | str,
    *,
    length: int = 2048,
    chunks: int | None = None,
    against: nn.Module | None = None,
    join: Join = "auto",
    column: str | None = None,
    directory: Path | str | None = None,
    speed: bool = False,
    progress: Tally | None = None,
) -> dict[str, Any]:
    """All figures of a checkpoint as plain data for JSON: perplexity, divergence from `against`, sizes, seconds, speed.

    directory: where the checkpoint lies, for its bytes on disk. speed: also time it (and `against` in turns with it).
    Raises what `perplexity` and `text_ids` raise, before the first forward.
    """
    ids = text_ids(text, tokenizer, join=join, column=column)
    start = time.perf_counter()
    if against is None:
        score = perplexity(model, ids, length=length, chunks=chunks, progress=progress)
        found = _figures(score)
    else:
        kl = kl_divergence(model, against, ids, length=length, chunks=chunks, progress=progress)
        score = kl.model
        found = _figures(score) | {
            "kl_nats": kl.mean_nats,
            "kl_se": kl.se,
            "agreement": kl.agreement,
            "against": _figures(kl.reference) | {"parameters": parameters(against)},
        }
    seconds = time.perf_counter() - start
    found |= {
        "text": str(text),
        "text_tokens": len(ids),
        "length": length,
        "chunks": len(score.per_chunk),
        "seconds": seconds,
        "tokens_per_second": len(score.per_chunk) * length / seconds,
        "parameters": parameters(model),
        "bytes_in_memory": sum(p.numel() * p.element_size() for p in model.parameters()),
        "bytes_on_disk": bytes_on_disk(directory) if directory is not None else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
    }
    if speed:
        room = int(getattr(model.config, "max_position_embeddings", None) or 272)
        prompt = min(256, room - 16)
        ratio = compare_speed(against, model, prompt=prompt) if against is not None else None
        found["speed"] = asdict(ratio if ratio is not None else measure_speed(model, prompt=prompt))
    return found


def _figures(score: Perplexity) -> dict[str, Any]:
    return {"ppl": score.ppl, "nats": score.nats, "se": score.se, "n_tokens": score.n_tokens}


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of a model, tied ones once: {"all": n, "blocks": those inside the decoder layers}."""
    counts = [(name, p.numel()) for name, p in model.named_parameters()]
    return {"all": sum(n for _, n in counts), "blocks": sum(n for name, n in counts if re.search(r"\.\d+\.", name))}


def bytes_on_disk(directory: Path | str) -> int | None:
    """Bytes of the weight files of a checkpoint directory (or of one file); None where there are none."""
    path = Path(directory)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.gguf")]
    return sum(f.stat().st_size for f in files) or None


__all__ = [
    "KL",
    "Perplexity",
    "Speed",
    "SpeedRatio",
    "bytes_on_disk",
    "chunked",
    "compare_speed",
    "evaluate",
    "kl_divergence",
    "measure_speed",
    "parameters",
    "perplexity",
    "shapes",
    "text_ids",
]
