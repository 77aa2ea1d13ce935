"""Floor 5: a checkpoint for another program, verified before it is handed over: `export()`, and how it writes GGUF."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from prunus.errors import UserError
from prunus.exporting import llamacpp, onnx_export, onnx_graph, vllm_export
from prunus.exporting.agreement import N_TOKENS, TEXT, agreement, divergence, log_probabilities, text_tokens
from prunus.exporting.architectures import Architecture, Shapes, carrier, shapes_of
from prunus.exporting.gguf_file import check, context_length, describe, stored, window, write
from prunus.exporting.gguf_tensors import KMIX, QUANTS, SUPERBLOCK, Planned, n_bytes, plan, round_weights, take_back
from prunus.exporting.gguf_vocabulary import check_tokenizer, copy_vocabulary, is_gguf, vocabulary, write_vocabulary
from prunus.models.checkpoint import MANIFEST, verify
from prunus.models.loading import Loaded, load
from prunus.progress import Progress, silent
from prunus.recording.artefact import flush, place, writing

FORMATS = ("gguf", "onnx", "vllm")
# Divergence that arithmetic alone may cause between llama.cpp and PyTorch with the same (rounded) weights, in nats per
# token: llama.cpp takes the activations as f16 or 8-bit blocks where the weights are. Measured on SmolLM2-135M, dense
# and compressed: up to 2e-6 in f16 and .015 in blocks; a wrong RoPE or norm on tiny random models: .5 and more.
# Beside K-quants it rounds activations in blocks of 256 and not 32: twice the divergence on tiny random models.
TOLERANCE = {"f32": 5e-3, "f16": 1e-2, "q8_0": 0.05, "q4_0": 0.05, "q4_k_m": 0.1, "q5_k_m": 0.1, "q6_k": 0.1}


def export(
    checkpoint: str,
    *,
    format: str = "gguf",
    quant: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    tokenizer: str | None = None,
    pre_tokenizer: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a checkpoint for another program, and return what was written and how it was tried.

    checkpoint: a directory that Prunus wrote, or whatever `prunus.models.loading.load` takes.
    format: gguf, one file for unmodified llama.cpp; onnx, a directory with a graph, its weights and the tokenizer;
    vllm, a directory that vLLM's own classes load.
    quant, tokenizer, pre_tokenizer: of a GGUF file. quant: f32, f16 (default), q8_0, q4_0, q4_k_m, q5_k_m or q6_k.
    tokenizer: a GGUF file to take the tokenizer from, as it stands there. pre_tokenizer: llama.cpp's name for a way of
    splitting words that is not known here.
    dtype, device: of PyTorch's weights. For gguf and onnx auto is float32 (in gguf, any other widens what the
    comparison allows; onnx takes no other); for vllm it is the checkpoint's.
    What is written stands beside its place until it has been tried; it is deleted if that fails.
    Raises UserError for everything that the user can mend, before the weights are read where it can be known.
    """
    target = _target(checkpoint, format, quant, out, overwrite)
    for name, value in (("quant", quant), ("tokenizer", tokenizer), ("pre-tokenizer", pre_tokenizer)):
        if value and format != "gguf":
            raise UserError(f"--{name} is for --format gguf; leave it out with --format {format}")
    if tokenizer:
        check_tokenizer(Path(tokenizer))
    if format == "onnx":
        onnx_graph.check_installed()
        if dtype not in ("auto", "float32"):
            raise UserError(
                f"an ONNX graph is written in float32, given --dtype {dtype}; onnxruntime's own tools make other types "
                "of it"
            )
    if (Path(checkpoint) / MANIFEST).is_file():
        verify(checkpoint)
    loaded = load(
        checkpoint,
        revision=revision,
        dtype="float32" if dtype == "auto" and format != "vllm" else dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        compress=False,
        widen=False,  # what is written is in the model's type
    )
    if format == "onnx":
        return onnx_export.write(loaded, target, progress)
    if format == "vllm":
        return vllm_export.write(loaded, target, progress)
    loaded.model.set_attn_implementation("eager")  # the one that knows all that a family asks for, Gemma 2's caps too
    return _written(loaded, target, quant or "f16", tokenizer, pre_tokenizer, progress)


def _written(
    loaded: Loaded, target: Path, quant: str, tokenizer: str | None, pre_tokenizer: str | None, progress: Progress
) -> dict[str, Any]:
    """Write the file under another name, try it, give it its name; what was written and how it was tried."""
    model = loaded.model
    one, shapes, planned = planning(model, "f32" if quant in KMIX else quant)
    _refuse_full(target, planned)
    words = None if tokenizer else vocabulary(loaded.tokenizer, int(model.config.vocab_size), pre_tokenizer)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")

    def fill(writer: Any) -> None:
        describe(writer, model.config, one, shapes)
        if words is not None:
            write_vocabulary(writer, words)
        else:
            copy_vocabulary(writer, Path(str(tokenizer)), int(model.config.vocab_size))

    with writing(target, partial):
        with progress("writing", len(planned)) as advance:
            write(partial, target.stem, one, planned, "f32" if quant in KMIX else quant, fill, advance)
        check(partial, planned)
        kinds = _mixed(partial, planned, quant, progress) if quant in KMIX else {}
        with progress("verification"):
            found = _tried(partial, loaded, one, planned, quant, strict=not (tokenizer or pre_tokenizer))
        flush(partial)
        place(partial, target)
    notes = [*_notes(model.config, one, planned, quant), *_fallen_back(planned, kinds), *found.pop("notes")]
    return {
        "file": str(target),
        "architecture": one.name,
        "quant": quant,
        "file_bytes": target.stat().st_size,
        "tensors": len(planned),
        **found,
        "notes": notes,
    }


def _mixed(path: Path, planned: list[Planned], quant: str, progress: Progress) -> dict[str, str]:
    """Let llama.cpp quantise a file (**in place**); the types that it chose."""
    mixed = path.with_name(f"{path.name}.{quant}")
    try:
        with progress(f"{quant}, by llama.cpp"):
            llamacpp.quantise(path, mixed, KMIX[quant], torch.get_num_threads())
        os.replace(mixed, path)
    except llamacpp.LlamaCppError as error:
        raise UserError(f"llama.cpp cannot quantise the file to {quant}: {error}. Use --quant q8_0 or q4_0") from error
    finally:
        mixed.unlink(missing_ok=True)
    return check(path, planned, free=True)


def _fallen_back(planned: list[Planned], kinds: dict[str, str]) -> list[str]:
    """Which matrices llama.cpp could not give a K-quant."""
    rows = {t.name: t.shape[-1] for t in planned}
    others = [name for name, kind in kinds.items() if rows.get(name, 0) % SUPERBLOCK and kind != "F32"]
    if not others:
        return []
    types = ", ".join(sorted({kinds[name].lower() for name in others}))
    return [
        f"{len(others)} matrices are {types}, as llama.cpp has it for rows that are no multiple of {SUPERBLOCK} "
        f"numbers long ({others[0]}: {rows[others[0]]}); search with search.mlp_step={SUPERBLOCK} to have more of them "
        "in K-quants, as far as the model's own sizes allow"
    ]


def planning(model: Any, quant: str) -> tuple[Architecture, Shapes, list[Planned]]:
    """The architecture that holds a model, its sizes, and every tensor of the file; UserError where there is none."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    one, shapes = carrier(model.config, tied), shapes_of(model.config)
    return one, shapes, plan(model, one, shapes, quant)


# --------------------------------------------------------------------------------------------------------- beforehand


def _target(checkpoint: str, format: str, quant: str | None, out: str | Path | None, overwrite: bool) -> Path:
    """Where it goes; raises UserError for what is not known, not installed, or in the way."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    gguf = format == "gguf"
    if gguf and (quant or "f16") not in (*QUANTS, *KMIX):
        raise UserError(f"unknown quantisation {quant!r}; known: {', '.join((*QUANTS, *KMIX))}")
    if quant in KMIX and llamacpp.installed() is None:
        raise UserError(
            f"{quant} is made by llama.cpp itself, which is not installed here: pip install 'prunus[llama-cpp]' (it "
            "compiles for minutes), or use --quant q8_0 or q4_0"
        )
    if gguf and importlib.util.find_spec("gguf") is None:
        raise UserError("writing a GGUF file needs the package gguf; install it with pip install 'prunus[gguf]'")
    if out is None:
        source = Path(checkpoint).expanduser()
        beside = source.resolve().parent if source.is_dir() else Path.cwd()
        gguf_named = source.suffix.lower() == ".gguf"  # "Llama-3.2-1B" has no suffix
        name = source.resolve().name if source.is_dir() else source.stem if gguf_named else source.name
        out = beside / (f"{name}-{quant or 'f16'}.gguf" if gguf else f"{name}-{format}")
    target = Path(out).expanduser().absolute()
    if gguf and (target.is_dir() or str(out).endswith(("/", os.sep))):
        raise UserError(f"{str(out)!r} is a directory; --out takes the name of a file")
    if not gguf and target.is_file():
        raise UserError(f"{str(out)!r} is a file; --format {format} writes a directory")
    if target.resolve() == Path(checkpoint).expanduser().resolve():
        raise UserError(f"{str(out)!r} is the checkpoint itself; give another --out")
    if target.exists() and not overwrite and (gguf or any(target.iterdir())):
        raise UserError(f"{str(out)!r} exists; give --overwrite to replace it, or another --out")
    if gguf and target.exists() and not is_gguf(target):
        raise UserError(f"{str(out)!r} is no GGUF file, so no export wrote it; choose another --out")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _refuse_full(target: Path, planned: list[Planned]) -> None:
    need, free = sum(map(n_bytes, planned)) + 2**24, shutil.disk_usage(target.parent).free
    if need > free:
        raise UserError(
            f"cannot write {str(target)!r}: it needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "make room or choose another place"
        )


def _notes(config: Any, one: Architecture, planned: list[Planned], quant: str) -> list[str]:
    """What a user should know that is not in the figures."""
    notes = []
    wider = [t for t in planned if t.kind == "f16" and quant in ("q8_0", "q4_0")]
    if wider:
        notes.append(
            f"{len(wider)} matrices stay in f16, since their rows are no multiple of 32 numbers long "
            f"({wider[0].name}: {wider[0].shape[-1]}); search with widths in steps of 32 to quantise them too"
        )
    if quant == "q4_0" and any(t.kind == "q8_0" for t in planned):
        notes.append("the embedding and the output matrix are q8_0, as four bits cost the most there")
    if (size := window(config, one)) is not None and size < int(config.max_position_embeddings):
        notes.append(
            f"architecture {one.name} has no sliding window, so the context ends at {context_length(config, one)} "
            "tokens, up to which the model has none either"
        )
    return notes


# -------------------------------------------------------------------------------------------------------- afterwards


def _tried(
    path: Path, loaded: Loaded, one: Architecture, planned: list[Planned], quant: str, strict: bool
) -> dict[str, Any]:
    """What llama.cpp makes of the file, against PyTorch; the model's weights are rounded as in the file (**in place**).

    strict: the file's tokenizer must give the checkpoint's tokens.
    """
    known = llamacpp.installed()
    if known is None:
        return {
            "verified": "read back: every tensor has its name, shape and type",
            "notes": [
                "not loaded in llama.cpp, since llama-cpp-python is not installed here "
                "(pip install 'prunus[llama-cpp]' compiles it)"
            ],
        }
    ids = text_tokens(loaded.tokenizer)
    tokens = ids[: min(N_TOKENS, context_length(loaded.model.config, one))]
    exact = log_probabilities(loaded.model, tokens)
    if quant in KMIX:
        numbers = stored(path)
        for tensor in planned:
            if tensor.modules and len(tensor.shape) == 2:
                take_back(tensor, torch.from_numpy(numbers(tensor.name)))
    else:
        round_weights(planned)
    reference = log_probabilities(loaded.model, tokens)
    try:
        answer = llamacpp.ask(path, tokens, TEXT, torch.get_num_threads())
    except llamacpp.LlamaCppError as error:
        raise UserError(
            f"llama.cpp (llama-cpp-python {known}) cannot load the file that was written, so it was deleted: {error}. "
            "Try a newer llama-cpp-python"
        ) from error
    notes = _compare_tokens(answer.tokens, ids, strict)
    given = torch.from_numpy(answer.logits).double().log_softmax(-1)
    arithmetic, apart = divergence(reference, given), divergence(exact, given)
    allowed = TOLERANCE[quant] if loaded.model.dtype == torch.float32 else max(TOLERANCE.values())
    if not arithmetic <= allowed:  # NaN too
        raise UserError(
            f"llama.cpp (llama-cpp-python {known}) computes something else than PyTorch with the same weights: "
            f"{arithmetic:.3g} nats per token apart, {allowed:g} allowed. The file was deleted; please report "
            "the model and both versions"
        )
    return {
        "verified": f"loaded and compared with PyTorch in llama-cpp-python {known}",
        "tokens_compared": len(tokens),
        "arithmetic_nats": arithmetic,
        "divergence_nats": apart,
        "agreement": agreement(exact, given),
        "notes": notes,
    }


def _compare_tokens(found: list[int], wanted: list[int], strict: bool) -> list[str]:
    if found == wanted:
        return []
    at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
    apart = f"llama.cpp's tokens of a text differ from the checkpoint's tokenizer's (first at token {at})"
    if not strict:
        return [f"{apart}, as the tokenizer was named by hand"]
    raise UserError(
        f"the tokenizer cannot be carried over to GGUF: {apart}. Name another --pre-tokenizer, or take the tokenizer "
        "from a GGUF file of the original model with --tokenizer"
    )
