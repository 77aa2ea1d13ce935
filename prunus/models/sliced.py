"""Language models whose residual stream is rotated and cut, after SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024).

This file needs only torch and transformers. Prunus copies it into such a checkpoint as `modeling_prunus_sliced.py`, so
that `from_pretrained(..., trust_remote_code=True)` works where Prunus is not installed.

Between any two sub-layers the stream lives in a rotation of its own and has `sliced_size` channels; two matrices of
each layer carry it from one rotation to the next. The norms have no weights (these are in the matrices that read
them) and divide by the size that the stream had before the cut. After the last layer it is whole again, so that the
final norm and the output matrix are the dense model's.
"""

# transformers does not type what these call
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

MODULE = "modeling_prunus_sliced"  # name of this file inside a checkpoint, without .py


class SlicedNorm(nn.Module):
    """RMS norm without weights, whose mean is over the channels that there were before the cut."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().pow(2).sum(-1, keepdim=True) / self.size
        return (x.float() * torch.rsqrt(square + self.eps)).to(x.dtype)


class SlicedLayer(nn.Module):
    """A decoder layer whose residual connections are matrices: `stock` is the class that its sub-layers come from."""

    def __init__(self, config: Any, i: int, stock: type[nn.Module], model_config: Any) -> None:
        super().__init__()
        own = copy.copy(config)
        own.hidden_size = config.sliced_size
        built: Any = stock(own, i)
        self.self_attn, self.mlp = built.self_attn, built.mlp
        self.self_attn.config = model_config  # the attention implementation is asked of the model's, live
        last = i == config.num_layers_in_all - 1
        narrow, out = config.sliced_size, config.hidden_size if last else config.sliced_size
        if last:
            down = self.mlp.down_proj
            self.mlp.down_proj = nn.Linear(down.in_features, out, bias=down.bias is not None)
        self.attention_shortcut = nn.Linear(narrow, narrow, bias=False)
        self.mlp_shortcut = nn.Linear(narrow, out, bias=False)
        self.input_layernorm = SlicedNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SlicedNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        added, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + added
        added = self.mlp(self.post_attention_layernorm(hidden_states))
        result: Tensor = self.mlp_shortcut(hidden_states) + added
        return result


class SlicedConfig:
    """Goes before a stock configuration: `sliced_size` channels between the layers, `hidden_size` after the last."""

    sliced_size: int = 0

    def validate(self) -> None:
        """Replaces the stock rule that the hidden size is a multiple of the heads: here a head's size is given."""

    def to_dict(self) -> dict[str, Any]:
        raw: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**raw, "auto_map": auto_map(str(raw["model_type"]))}


def auto_map(model_type: str) -> dict[str, str]:
    """Which classes of this file the Auto classes load, as config.json spells it."""
    names = (n.__name__ for n in CLASSES[model_type])
    return dict(zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), (f"{MODULE}.{n}" for n in names), strict=True))


class SlicedModel:
    """Goes before a stock model class: builds the frame without layers, then narrow ones."""

    stock_layer: type[nn.Module]

    def __init__(self, config: Any) -> None:
        n = config.num_hidden_layers
        config.num_hidden_layers = 0
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = n
        me: Any = self
        base, own = me.base_model, copy.copy(config)
        own.num_layers_in_all = n
        table = base.embed_tokens
        base.embed_tokens = nn.Embedding(table.num_embeddings, config.sliced_size, table.padding_idx)
        base.layers.extend([SlicedLayer(own, i, self.stock_layer, config) for i in range(n)])
        me.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and this file beside it, so that the copy loads like the original."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        source = Path(str(sys.modules[SlicedModel.__module__].__file__))
        target = Path(save_directory) / f"{MODULE}.py"
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)


# -------------------------------------------------------------------------------------------------------- classes


class PrunusSlicedLlamaConfig(SlicedConfig, LlamaConfig):
    model_type = "prunus_sliced_llama"
    sliced_size: int = 0


class PrunusSlicedLlamaModel(SlicedModel, LlamaModel):
    config_class = PrunusSlicedLlamaConfig
    stock_layer = LlamaDecoderLayer


class PrunusSlicedLlamaForCausalLM(SlicedModel, LlamaForCausalLM):
    config_class = PrunusSlicedLlamaConfig
    stock_layer = LlamaDecoderLayer


class PrunusSlicedMistralConfig(SlicedConfig, MistralConfig):
    model_type = "prunus_sliced_mistral"
    sliced_size: int = 0


class PrunusSlicedMistralModel(SlicedModel, MistralModel):
    config_class = PrunusSlicedMistralConfig
    stock_layer = MistralDecoderLayer


class PrunusSlicedMistralForCausalLM(SlicedModel, MistralForCausalLM):
    config_class = PrunusSlicedMistralConfig
    stock_layer = MistralDecoderLayer


class PrunusSlicedQwen2Config(SlicedConfig, Qwen2Config):
    model_type = "prunus_sliced_qwen2"
    sliced_size: int = 0


class PrunusSlicedQwen2Model(SlicedModel, Qwen2Model):
    config_class = PrunusSlicedQwen2Config
    stock_layer = Qwen2DecoderLayer


class PrunusSlicedQwen2ForCausalLM(SlicedModel, Qwen2ForCausalLM):
    config_class = PrunusSlicedQwen2Config
    stock_layer = Qwen2DecoderLayer


class PrunusSlicedQwen3Config(SlicedConfig, Qwen3Config):
    model_type = "prunus_sliced_qwen3"
    sliced_size: int = 0


class PrunusSlicedQwen3Model(SlicedModel, Qwen3Model):
    config_class = PrunusSlicedQwen3Config
    stock_layer = Qwen3DecoderLayer


class PrunusSlicedQwen3ForCausalLM(SlicedModel, Qwen3ForCausalLM):
    config_class = PrunusSlicedQwen3Config
    stock_layer = Qwen3DecoderLayer


class PrunusSlicedPhi3Config(SlicedConfig, Phi3Config):
    model_type = "prunus_sliced_phi3"
    sliced_size: int = 0


class PrunusSlicedPhi3Model(SlicedModel, Phi3Model):
    config_class = PrunusSlicedPhi3Config
    stock_layer = Phi3DecoderLayer


class PrunusSlicedPhi3ForCausalLM(SlicedModel, Phi3ForCausalLM):
    config_class = PrunusSlicedPhi3Config
    stock_layer = Phi3DecoderLayer


CLASSES: dict[str, tuple[type, type, type]] = {
    config.model_type: (config, model, causal)
    for config, model, causal in (
        (PrunusSlicedLlamaConfig, PrunusSlicedLlamaModel, PrunusSlicedLlamaForCausalLM),
        (PrunusSlicedMistralConfig, PrunusSlicedMistralModel, PrunusSlicedMistralForCausalLM),
        (PrunusSlicedQwen2Config, PrunusSlicedQwen2Model, PrunusSlicedQwen2ForCausalLM),
        (PrunusSlicedQwen3Config, PrunusSlicedQwen3Model, PrunusSlicedQwen3ForCausalLM),
        (PrunusSlicedPhi3Config, PrunusSlicedPhi3Model, PrunusSlicedPhi3ForCausalLM),
    )
}


def register() -> None:
    """Tell transformers' Auto classes about these, so that `trust_remote_code` is not needed in this process."""
    for model_type, (config, model, causal) in CLASSES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


if __name__ == "prunus.models.sliced":
    register()
