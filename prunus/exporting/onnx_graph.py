"""Floor 2: an ONNX graph of a model, with the KV cache as inputs and outputs, and what onnxruntime makes of it.

The graph is traced by transformers' own exporter (torch.export, then torch's ONNX translation). One graph reads a
prompt, with an empty cache, and decodes, with what it gave back the last time. Names are those that ONNX programs for
language models expect: `past_key_values.0.key` goes in, `present.0.key` comes out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.errors import UserError

GRAPH = "model.onnx"
WEIGHTS = f"{GRAPH}.data"  # beside the graph: protobuf ends at 2 GB
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_CACHE = re.compile(r"^(?:input\.|output\.)?past_key_values\.layers\.(\d+)\.(key|value)s$")
_PAST, _NEW, _BATCH = 3, 4, 2  # sizes that are traced; 1 would be taken for a constant
Arrays = dict[str, np.ndarray[Any, Any]]


def check_installed() -> None:
    """Raise UserError where a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"writing ONNX needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}; install with "
            "pip install 'prunus[onnx]'"
        )
    if importlib.util.find_spec("transformers.exporters") is None:
        raise UserError(
            f"transformers {version('transformers')} has no ONNX exporter; upgrade it: pip install -U transformers"
        )


def has_window(config: Any) -> bool:
    """True if some layer forgets what is further back than a sliding window: its cache cannot grow with the text."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return bool(window) and ("sliding_attention" in kinds if kinds else True)


def trace(model: Any, *, cached: bool) -> Any:
    """The graph of a model (float32, on the CPU) as an `onnx_ir.Model`, with batch and lengths left open.

    cached: with the KV cache; otherwise the graph reads whole texts.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    free: Any = torch.export.Dim.AUTO
    inputs, shapes = _sample(model, cached, free)
    with _quiet():
        exporter: Any = OnnxExporter
        exported = exporter().export(model, inputs, OnnxConfig(dynamic_shapes=shapes))
    program = exported.program
    _name(program.graph, cached)
    return program


@torch.inference_mode()
def _sample(model: Any, cached: bool, free: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace with, and which of their axes are left open."""
    ids = torch.arange(_BATCH * (_PAST + _NEW)).reshape(_BATCH, -1) % int(model.config.vocab_size)
    mask, open_axes = torch.ones_like(ids), {0: free, 1: free}
    if not cached:
        shapes = {"input_ids": open_axes, "attention_mask": open_axes}
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}, shapes
    before = model(input_ids=ids[:, :_PAST], use_cache=True).past_key_values
    positions = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, -1).contiguous()
    inputs = {
        "input_ids": ids[:, _PAST:].contiguous(),
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": before,
        "use_cache": True,
    }
    n = 2 * len(before.layers)  # keys and values
    shapes = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), open_axes)
    return inputs, {**shapes, "past_key_values": [{0: free, 2: free}] * n}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report every stage and every package that they could do without; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers.exporters", "onnxscript", "onnx_ir")]
    loggers += [logging.getLogger(name) for name in ("transformers", "torch.export", "torch.onnx._internal.exporter")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _name(graph: Any, cached: bool) -> None:
    """Give inputs and outputs their customary names, and the open axes words (**in place**)."""
    ends = (*graph.inputs, *graph.outputs)
    for value in ends:
        if found := _CACHE.match(value.name):
            which = "past_key_values" if value in graph.inputs else "present"
            value.name = f"{which}.{found[1]}.{found[2]}"
    by_name = {value.name: value for value in graph.inputs}
    axes = {"input_ids": ("batch", "tokens"), "attention_mask": ("batch", "past_and_tokens" if cached else "tokens")}
    axes |= {name: ("batch", None, "past", None) for name in by_name if name.startswith("past_key_values.")}
    axes |= {"position_ids": ("batch", "tokens")} if "position_ids" in by_name else {}
    words = {}
    for name, names in axes.items():
        for dim, word in zip(by_name[name].shape, names, strict=True):
            if word and not isinstance(dim, int) and str(dim.value).isidentifier():
                words[str(dim.value)] = word
    for value in _values(graph):
        _rename(value, words)


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _rename(value: Any, words: dict[str, str]) -> None:
    """Open axes by their words; `4` as a word is the number."""
    if value.shape is None:
        return
    for i, dim in enumerate(value.shape):
        text = None if isinstance(dim, int) else dim.value
        if text is None:
            continue
        new = re.sub(r"[A-Za-z_]\w*", lambda found: words.get(found[0], found[0]), text)
        value.shape[i] = int(new) if new.isdigit() else new


def save(program: Any, directory: Path) -> None:
    """Write the graph, and its weights beside it."""
    from transformers.exporters.exporter_onnx import OnnxExporter

    OnnxExporter.save_program(program, directory / GRAPH)


# -------------------------------------------------------------------------------------------------------- running it


class Session:
    """A graph in onnxruntime, on the CPU."""

    def __init__(self, directory: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(directory / GRAPH), options, providers=providers)
        self.shapes = {one.name: list(one.shape) for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]

    @property
    def cached(self) -> bool:
        """True if the graph takes a KV cache."""
        return any(name.startswith("past_key_values.") for name in self.shapes)

    def empty(self, batch: int) -> Arrays:
        """A cache of no tokens."""
        caches = ((name, shape) for name, shape in self.shapes.items() if name.startswith("past_key_values."))
        return {name: np.zeros((batch, shape[1], 0, shape[3]), np.float32) for name, shape in caches}

    def run(self, ids: Tensor, mask: Tensor, past: Arrays) -> tuple[Tensor, Arrays]:
        """The logits (batch, tokens, vocab) of new tokens, and the cache with them; mask: of past and new tokens."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feed: Arrays = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **past}
        if "position_ids" in self.shapes:
            feed["position_ids"] = positions.numpy()
        found = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        present = {name.replace("present.", "past_key_values.", 1): found[name] for name in found if "present." in name}
        return torch.from_numpy(found["logits"]), present

    def in_pieces(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """The logits (tokens, vocab) of a text that is given in pieces of these lengths, through the cache."""
        past, logits, seen = self.empty(1), [], 0
        for n in lengths:
            ids = torch.tensor([tokens[seen : seen + n]])
            seen += n
            out, past = self.run(ids, torch.ones(1, seen, dtype=torch.long), past)
            logits.append(out[0])
        return torch.cat(logits)
