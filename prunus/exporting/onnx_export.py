"""Floor 5: a checkpoint as an ONNX graph, compared with PyTorch in onnxruntime before it is handed over."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.errors import UserError
from prunus.exporting import onnx_graph
from prunus.exporting.agreement import N_TOKENS, agreement, divergence, log_probabilities, text_tokens
from prunus.exporting.onnx_graph import Session
from prunus.models import ragged
from prunus.models.checkpoint import save_files, tidy_tokenizer
from prunus.models.loading import Loaded
from prunus.progress import Progress

TOLERANCE = 1e-4  # nats per token; arithmetic in another order: under 1e-6 on SmolLM2-135M, a wrong mask: above 1e-2


def write(loaded: Loaded, target: Path, progress: Progress) -> dict[str, Any]:
    """Write the graph, its weights, tokenizer and configuration into a directory, whole or not at all.

    loaded: float32. Returns what was written and how it was tried. Raises UserError where the model cannot be traced,
    or where onnxruntime computes something else; nothing is left then.
    """
    model, tokens = loaded.model.cpu(), text_tokens(loaded.tokenizer)
    tokens = tokens[: min(N_TOKENS, int(model.config.max_position_embeddings))]
    model.set_attn_implementation("eager" if "gemma2" in model.config.model_type else "sdpa")  # sdpa cannot cap scores
    reference = log_probabilities(model, tokens)
    cached = not onnx_graph.has_window(model.config)
    n_bytes = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    found: dict[str, Any] = {}

    def fill(partial: Path) -> None:
        with progress("tracing"):
            program = _traced(model, cached)
            onnx_graph.save(program, partial)
        _companions(loaded, partial)
        with progress("verification"):
            found.update(_tried(partial, model, tokens, reference))

    save_files(target, fill, n_bytes=n_bytes, manifest={"format": "onnx", "source": vars(loaded.source)})
    notes = []
    if not cached:
        notes.append(
            "the graph has no KV cache, since layers of this model see a sliding window, whose cache does not grow "
            "with the text: it reads a whole text at a time"
        )
    return {
        "file": str(target / onnx_graph.GRAPH),
        "architecture": type(model).__name__,
        "cache": cached,
        "file_bytes": sum((target / name).stat().st_size for name in (onnx_graph.GRAPH, onnx_graph.WEIGHTS)),
        **found,
        "notes": notes,
    }


def _traced(model: Any, cached: bool) -> Any:
    try:
        return onnx_graph.trace(model, cached=cached)
    except Exception as error:  # the tracers raise a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"this {model.config.model_type} model cannot be traced to ONNX with transformers "
            f"{version('transformers')}, torch {version('torch')} and onnxscript {version('onnxscript')} ({reason}); "
            "run the checkpoint in transformers, or try other versions of them"
        ) from error


def _companions(loaded: Loaded, directory: Path) -> None:
    """What a program reads beside the graph: configuration and tokenizer."""
    model = loaded.model
    model.config.save_pretrained(directory)
    if model.config.model_type in ragged.CLASSES:  # its configuration names the file
        shutil.copyfile(str(ragged.__file__), directory / f"{ragged.MODULE}.py")
    loaded.tokenizer.save_pretrained(directory)
    tidy_tokenizer(directory)


def _tried(directory: Path, model: Any, tokens: list[int], reference: Tensor) -> dict[str, Any]:
    """The graph in onnxruntime against PyTorch: a whole text, a padded batch, and in pieces through the cache."""
    session = Session(directory, torch.get_num_threads())
    ids = torch.tensor([tokens])
    whole = session.run(ids, torch.ones_like(ids), session.empty(1))[0][0]
    apart = {"a whole text": divergence(reference, whole.double().log_softmax(-1))}
    apart["a padded batch"] = _padded(session, model, tokens)
    if session.cached:
        third = max(1, len(tokens) // 3)
        lengths = (third, *[1] * 4, len(tokens) - third - 4) if len(tokens) > third + 4 else (len(tokens),)
        pieces = session.in_pieces(tokens, lengths)
        apart["a text in pieces"] = divergence(reference, pieces.double().log_softmax(-1))
    for case, nats in apart.items():
        if not nats <= TOLERANCE:  # NaN too
            raise UserError(
                f"onnxruntime {version('onnxruntime')} computes something else than PyTorch for {case}: {nats:.3g} "
                f"nats per token apart, {TOLERANCE:g} allowed. Nothing was kept; please report the model"
            )
    return {
        "verified": f"{', '.join(apart)}: the logits of PyTorch in onnxruntime {version('onnxruntime')}",
        "tokens_compared": len(tokens),
        "arithmetic_nats": max(apart.values()),
        "largest_difference": float((whole - _logits(model, ids)).abs().max()),
        "agreement": agreement(reference, whole.double()),
    }


@torch.inference_mode()
def _logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    return found


@torch.inference_mode()
def _padded(session: Session, model: Any, tokens: list[int]) -> float:
    """Divergence of a batch of three, in which two texts are shorter and padded on the left, in nats per token."""
    n = len(tokens)
    ids, mask = torch.zeros(3, n, dtype=torch.long), torch.zeros(3, n, dtype=torch.long)
    for row, length in enumerate((n, max(1, n // 2), max(1, n - 1))):
        ids[row, n - length :] = torch.tensor(tokens[:length])
        mask[row, n - length :] = 1
    found = session.run(ids, mask, session.empty(3))[0]
    wanted: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    seen = mask.bool()
    return divergence(wanted[seen].double().log_softmax(-1), found[seen].double().log_softmax(-1))
