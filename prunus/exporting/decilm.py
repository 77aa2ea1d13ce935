"""The configuration of a DeciLM (nemotron-nas) checkpoint, whose layers have widths of their own in `block_configs`.

This file needs only transformers. Prunus copies it into checkpoints that it writes for vLLM, which has the model but
takes its configuration class from the checkpoint (`--trust-remote-code`). Each entry of `block_configs` says of one
layer: `attention.no_op`, `attention.n_heads_in_group` (query heads that share a key-value head; the number of query
heads is `num_attention_heads` in all layers), `ffn.no_op`, `ffn.intermediate_size`.
"""

# transformers does not type what these call
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

MODULE = "configuration_decilm"  # name of this file inside a checkpoint, without .py


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**block[part]) for part in ("attention", "ffn")})
            for block in block_configs or ()
        ]

    def validate(self) -> None:
        """Replaces the stock rule that the hidden size is a multiple of the heads: here a head's size is given."""

    def to_dict(self) -> dict[str, Any]:
        raw: dict[str, Any] = super().to_dict()
        blocks = [{part: dict(vars(values)) for part, values in vars(block).items()} for block in self.block_configs]
        name = f"{MODULE}.{type(self).__name__}"
        return {
            **raw,
            "block_configs": blocks,
            "auto_map": {"AutoConfig": name},
            "architectures": ["DeciLMForCausalLM"],
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
