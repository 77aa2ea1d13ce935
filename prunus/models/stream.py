"""Floor 2: run a model layer by layer, so that only hidden states travel and any layer can be entered from a cache.

Hugging Face's own modules do all the work: the arguments that the model passes to each of its layers (masks, rotary
embeddings, which differ per layer in Gemma) are recorded once per batch shape, by running it with recorders in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.models.families import Family
from prunus.models.slicing import layers_of


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes how it is called and passes the hidden states on."""

    def __init__(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], layer: nn.Module) -> None:
        super().__init__()
        self.calls = calls
        self.attention_type = getattr(layer, "attention_type", None)  # read by some models' own loops

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return hidden_states


class LayerStream:
    """A model seen as embedding, layers and head.

    Hidden states are (batch, length, hidden), in the model's dtype, or in float32 inside `carrying_float32`. All
    sequences of a batch are full: no padding. Under `slicing.activate` the same stream computes as the sub-network.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.family = family
        self.layers = layers_of(model, family)
        self._calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._exact = False

    @contextmanager
    def carrying_float32(self) -> Iterator[None]:
        """Inside the block the residual stream is float32, whatever the dtype of the weights.

        A layer adds its outputs to the stream without rounding the sum to the weights' dtype; matrices (and norms that
        cannot mix dtypes) see their inputs rounded as always. In bfloat16 the rounding of the stream is as large as the
        drift of a network that keeps 90 % of its parameters.
        """
        hooks = [
            module.register_forward_pre_hook(_rounded)
            for layer in self.layers
            for module in layer.modules()
            if isinstance(module, nn.Linear | nn.LayerNorm | Conv1D)
        ]
        self._exact = True
        try:
            yield
        finally:
            self._exact = False
            for hook in hooks:
                hook.remove()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __len__(self) -> int:
        return len(self.layers)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) -> the hidden states that enter layer 0."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        modules = list(self.layers)
        norm = self.model.get_submodule(self.family.final_norm)
        caught: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            for i, layer in enumerate(modules):
                self.layers[i] = _Recorder(calls, layer)
            self.model.base_model(input_ids=ids.to(self.device), use_cache=False)  # type: ignore[operator]
        finally:
            hook.remove()
            for i, layer in enumerate(modules):
                self.layers[i] = layer
        self._calls[int(ids.shape[0]), int(ids.shape[1])] = calls
        return caught[0].float() if self._exact else caught[0]

    def run(self, i: int, hidden: Tensor) -> Tensor:
        """One decoder layer. The batch shape must have passed through `embed` once."""
        shape = int(hidden.shape[0]), int(hidden.shape[1])
        if shape not in self._calls:
            self.embed(torch.zeros(shape, dtype=torch.long))
        args, kwargs = self._calls[shape][i]
        out = self.layers[i](hidden, *args, **kwargs)
        after: Tensor = out[0] if isinstance(out, tuple) else out  # some versions return (hidden states, ...)
        return after

    def run_from(self, start: int, hidden: Tensor) -> Tensor:
        """Layers start..end; hidden states before layer `start` -> hidden states that leave the last layer."""
        for i in range(start, len(self.layers)):
            hidden = self.run(i, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states that left the last layer (..., hidden) -> logits (..., vocab), in the model's dtype."""
        norm = self.model.get_submodule(self.family.final_norm)
        if self._exact:
            hidden = hidden.to(next(norm.parameters()).dtype)
        hidden = norm(hidden)
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[operator]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def _rounded(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (inputs[0].to(weight.dtype), *inputs[1:])


@contextmanager
def inputs_of(layer: nn.Module, *paths: str) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the dict holds the last input of each named module of one layer."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[path] = inputs[0]

        return layer.get_submodule(path).register_forward_pre_hook(hook)

    hooks = [watch(path) for path in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
