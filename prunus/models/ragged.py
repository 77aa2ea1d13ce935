"""Language models whose layers differ in width: stock transformers layers, each built from its own part of config.json.

This file needs only torch and transformers. Prunus copies it into every checkpoint that a stock class cannot hold, as
`modeling_prunus.py`, so that `from_pretrained(..., trust_remote_code=True)` works where Prunus is not installed. Where
Prunus is imported, the classes are registered and `trust_remote_code` is not needed.

`config.json` carries transformers' own `per_layer_config`: for each layer the numbers that differ from the flat keys,
and `"skip": ["attention"]` or `["mlp"]` for a sub-layer that is gone together with its norms. The size of a head is
always the original one, so RoPE frequencies and the attention scale are those of the model it came from.
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
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    PhiConfig,
    PhiForCausalLM,
    PhiModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.pytorch_utils import Conv1D

_LAYERS = "_heterogeneity_spec"  # where transformers keeps per_layer_config; with it, flat keys cannot be read
MODULE = "modeling_prunus"  # name of this file inside a checkpoint, without .py

if not hasattr(LlamaConfig, "per_layer_config"):
    raise ImportError("layers of different widths need transformers >= 5.15 (its per_layer_config); please upgrade it")


# ------------------------------------------------------------------------------------- sub-layers that add nothing


class Nothing(nn.Module):
    """What is left of a sub-layer. (transformers takes a direct `...Attention(nn.Module)` for one it cannot switch.)"""


class NoAttention(Nothing):
    """Stands where an attention was: adds nothing, but tells the cache how many tokens went by.

    Masks take their lengths from the first layer of each attention type, which may be this one.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None:
            batch, length = hidden_states.shape[:2]
            kept = getattr(cache.layers[self.layer_idx], "keys", None) if len(cache.layers) > self.layer_idx else None
            heads, size = (kept.shape[1], kept.shape[3]) if kept is not None and kept.ndim == 4 else (1, 1)
            nothing = hidden_states.new_zeros(batch, heads, length, size)
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(Nothing):
    """Stands where an MLP was: adds nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


# ------------------------------------------------------------------------------------------------- configurations


class LayerConfig:
    """What one layer reads of its configuration; the attention implementation is read from the model's, live."""

    def __init__(self, model: Any, own: Any) -> None:
        self.model, self.own = model, own

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "own") or name.startswith("__"):  # not there yet while copying or unpickling
            raise AttributeError(name)
        return getattr(self.model if name == "_attn_implementation" else self.own, name)


class RaggedConfig:
    """Goes before a stock configuration: no rule about hidden size and heads, and always the whole `auto_map`."""

    def validate(self) -> None:
        """Replaces the stock rule that the hidden size is a multiple of the heads: here a head's size is given."""

    def to_dict(self) -> dict[str, Any]:
        raw: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**raw, "auto_map": auto_map(str(raw["model_type"]))}


def auto_map(model_type: str) -> dict[str, str]:
    """Which classes of this file the Auto classes load, as config.json spells it."""
    names = (n.__name__ for n in CLASSES[model_type])
    return dict(zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), (f"{MODULE}.{n}" for n in names), strict=True))


# --------------------------------------------------------------------------------------------------------- layers


class RaggedModel:
    """Goes before a stock model class: builds the frame without layers, then each layer from its own configuration."""

    stock_layer: type[nn.Module]  # the stock decoder layer
    layers_path: str = "layers"  # where they are, seen from the base model
    attention_path: str = "self_attn"
    mlp_paths: tuple[str, ...] = ("mlp",)
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    def __init__(self, config: Any) -> None:
        n, layers = config.num_hidden_layers, config.__dict__.pop(_LAYERS, None)
        config.num_hidden_layers = 0
        try:  # the frame sees the flat keys only: some kinds of RoPE ask for heads that they do not use
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = n
            if layers is not None:
                setattr(config, _LAYERS, layers)
        me: Any = self
        for module in me.modules():
            if hasattr(module, "rope_type"):  # and some ask again, when a text grows long
                module.config = config.per_layer_config[0]
        me.base_model.get_submodule(self.layers_path).extend([self._build(config, i) for i in range(n)])
        me.post_init()

    def _build(self, config: Any, i: int) -> nn.Module:
        own = copy.copy(config.per_layer_config[i])
        skip = getattr(own, "skip", ())
        layer = self._stock(own, i)
        if "attention" in skip:
            layer.set_submodule(self.attention_path, NoAttention(i))
            _remove(layer, self.attention_norms)
        else:
            kv_heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
            if own.num_attention_heads % kv_heads:
                raise ValueError(f"layer {i} has {own.num_attention_heads} heads for {kv_heads} key-value heads")
            attention: Any = layer.get_submodule(self.attention_path)
            self._fit(attention, own)
            attention.config = LayerConfig(config, own)
        if "mlp" in skip:
            _remove(layer, (*self.mlp_paths[:-1], *self.mlp_norms))
            layer.set_submodule(self.mlp_paths[-1], NoMLP())
        return layer

    def _stock(self, own: Any, i: int) -> nn.Module:
        return self.stock_layer(own, i)

    def _fit(self, attention: Any, own: Any) -> None:
        """Widen or narrow what the stock attention cannot be told by its configuration (**in place**)."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and this file beside it, so that the copy loads like the original."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        source = Path(str(sys.modules[RaggedModel.__module__].__file__))
        target = Path(save_directory) / f"{MODULE}.py"
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)


def _remove(layer: nn.Module, paths: tuple[str, ...]) -> None:
    for path in paths:
        layer.set_submodule(path, nn.Identity())


class _SquareHeads(RaggedModel):
    """For stock attentions that take the size of a head to be hidden size / heads: built with one head, then fitted."""

    def _stock(self, own: Any, i: int) -> nn.Module:
        square = copy.copy(own)
        square.num_attention_heads = 1
        return self.stock_layer(square, i)


class _GemmaNorms(RaggedModel):
    attention_norms = ("input_layernorm", "post_attention_layernorm")
    mlp_norms = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


class _Olmo2(RaggedModel):
    stock_layer = Olmo2DecoderLayer
    attention_norms = ("post_attention_layernorm",)
    mlp_norms = ("post_feedforward_layernorm",)


class _Phi(RaggedModel):
    stock_layer = PhiDecoderLayer
    attention_norms = ()  # one norm feeds attention and MLP
    mlp_norms = ()

    def _fit(self, attention: Any, own: Any) -> None:
        if attention.qk_layernorm:  # the stock class sizes them hidden size / heads
            attention.q_layernorm = nn.LayerNorm(own.head_dim, eps=own.layer_norm_eps)
            attention.k_layernorm = nn.LayerNorm(own.head_dim, eps=own.layer_norm_eps)


class _GPTNeoX(_SquareHeads):
    stock_layer = GPTNeoXLayer
    attention_path = "attention"

    def _fit(self, attention: Any, own: Any) -> None:
        inner = own.num_attention_heads * own.head_dim
        attention.head_size = own.head_dim
        attention.rotary_ndims = int(own.head_dim * own.rope_parameters.get("partial_rotary_factor", 1.0))
        attention.scaling = own.head_dim**-0.5
        attention.query_key_value = nn.Linear(own.hidden_size, 3 * inner, bias=own.attention_bias)
        attention.dense = nn.Linear(inner, own.hidden_size, bias=own.attention_bias)


class _OPT(_SquareHeads):
    stock_layer = OPTDecoderLayer
    layers_path = "decoder.layers"
    mlp_paths = ("fc1", "fc2")
    attention_norms = ("self_attn_layer_norm",)
    mlp_norms = ("final_layer_norm",)

    def _fit(self, attention: Any, own: Any) -> None:
        inner = own.num_attention_heads * own.head_dim
        attention.num_heads, attention.head_dim = own.num_attention_heads, own.head_dim
        attention.scaling = own.head_dim**-0.5
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, nn.Linear(own.hidden_size, inner, bias=own.enable_bias))
        attention.out_proj = nn.Linear(inner, own.hidden_size, bias=own.enable_bias)


class _GPT2(_SquareHeads):
    stock_layer = GPT2Block
    layers_path = "h"
    attention_path = "attn"
    attention_norms = ("ln_1",)
    mlp_norms = ("ln_2",)

    def _fit(self, attention: Any, own: Any) -> None:
        inner = own.num_attention_heads * own.head_dim
        attention.num_heads, attention.head_dim, attention.split_size = own.num_attention_heads, own.head_dim, inner
        attention.scaling = own.head_dim**-0.5 if own.scale_attn_weights else 1.0
        if own.scale_attn_by_inverse_layer_idx:  # the number that the layer had before others were left out
            attention.scaling /= float(getattr(own, "original_layer", attention.layer_idx) + 1)
        attention.c_attn = Conv1D(3 * inner, own.hidden_size)
        attention.c_proj = Conv1D(own.hidden_size, inner)


# -------------------------------------------------------------------------------------------------------- classes


class PrunusLlamaConfig(RaggedConfig, LlamaConfig):
    model_type = "prunus_llama"


class PrunusLlamaModel(RaggedModel, LlamaModel):
    config_class = PrunusLlamaConfig
    stock_layer = LlamaDecoderLayer


class PrunusLlamaForCausalLM(RaggedModel, LlamaForCausalLM):
    config_class = PrunusLlamaConfig
    stock_layer = LlamaDecoderLayer


class PrunusMistralConfig(RaggedConfig, MistralConfig):
    model_type = "prunus_mistral"


class PrunusMistralModel(RaggedModel, MistralModel):
    config_class = PrunusMistralConfig
    stock_layer = MistralDecoderLayer


class PrunusMistralForCausalLM(RaggedModel, MistralForCausalLM):
    config_class = PrunusMistralConfig
    stock_layer = MistralDecoderLayer


class PrunusQwen2Config(RaggedConfig, Qwen2Config):
    model_type = "prunus_qwen2"


class PrunusQwen2Model(RaggedModel, Qwen2Model):
    config_class = PrunusQwen2Config
    stock_layer = Qwen2DecoderLayer


class PrunusQwen2ForCausalLM(RaggedModel, Qwen2ForCausalLM):
    config_class = PrunusQwen2Config
    stock_layer = Qwen2DecoderLayer


class PrunusQwen3Config(RaggedConfig, Qwen3Config):
    model_type = "prunus_qwen3"


class PrunusQwen3Model(RaggedModel, Qwen3Model):
    config_class = PrunusQwen3Config
    stock_layer = Qwen3DecoderLayer


class PrunusQwen3ForCausalLM(RaggedModel, Qwen3ForCausalLM):
    config_class = PrunusQwen3Config
    stock_layer = Qwen3DecoderLayer


class PrunusGemma2Config(RaggedConfig, Gemma2Config):
    model_type = "prunus_gemma2"


class PrunusGemma2Model(_GemmaNorms, Gemma2Model):
    config_class = PrunusGemma2Config
    stock_layer = Gemma2DecoderLayer


class PrunusGemma2ForCausalLM(_GemmaNorms, Gemma2ForCausalLM):
    config_class = PrunusGemma2Config
    stock_layer = Gemma2DecoderLayer


class PrunusGemma3Config(RaggedConfig, Gemma3TextConfig):
    model_type = "prunus_gemma3_text"


class PrunusGemma3Model(_GemmaNorms, Gemma3TextModel):
    config_class = PrunusGemma3Config
    stock_layer = Gemma3DecoderLayer


class PrunusGemma3ForCausalLM(_GemmaNorms, Gemma3ForCausalLM):
    config_class = PrunusGemma3Config
    stock_layer = Gemma3DecoderLayer


class PrunusOlmo2Config(RaggedConfig, Olmo2Config):
    model_type = "prunus_olmo2"


class PrunusOlmo2Model(_Olmo2, Olmo2Model):
    config_class = PrunusOlmo2Config


class PrunusOlmo2ForCausalLM(_Olmo2, Olmo2ForCausalLM):
    config_class = PrunusOlmo2Config


class PrunusPhiConfig(RaggedConfig, PhiConfig):
    model_type = "prunus_phi"


class PrunusPhiModel(_Phi, PhiModel):
    config_class = PrunusPhiConfig


class PrunusPhiForCausalLM(_Phi, PhiForCausalLM):
    config_class = PrunusPhiConfig


class PrunusPhi3Config(RaggedConfig, Phi3Config):
    model_type = "prunus_phi3"


class PrunusPhi3Model(RaggedModel, Phi3Model):
    config_class = PrunusPhi3Config
    stock_layer = Phi3DecoderLayer


class PrunusPhi3ForCausalLM(RaggedModel, Phi3ForCausalLM):
    config_class = PrunusPhi3Config
    stock_layer = Phi3DecoderLayer


class PrunusGPTNeoXConfig(RaggedConfig, GPTNeoXConfig):
    model_type = "prunus_gpt_neox"


class PrunusGPTNeoXModel(_GPTNeoX, GPTNeoXModel):
    config_class = PrunusGPTNeoXConfig


class PrunusGPTNeoXForCausalLM(_GPTNeoX, GPTNeoXForCausalLM):
    config_class = PrunusGPTNeoXConfig


class PrunusOPTConfig(RaggedConfig, OPTConfig):
    model_type = "prunus_opt"


class PrunusOPTModel(_OPT, OPTModel):
    config_class = PrunusOPTConfig


class PrunusOPTForCausalLM(_OPT, OPTForCausalLM):
    config_class = PrunusOPTConfig


class PrunusGPT2Config(RaggedConfig, GPT2Config):
    model_type = "prunus_gpt2"


class PrunusGPT2Model(_GPT2, GPT2Model):
    config_class = PrunusGPT2Config


class PrunusGPT2ForCausalLM(_GPT2, GPT2LMHeadModel):
    config_class = PrunusGPT2Config


CLASSES: dict[str, tuple[type, type, type]] = {
    config.model_type: (config, model, causal)
    for config, model, causal in (
        (PrunusLlamaConfig, PrunusLlamaModel, PrunusLlamaForCausalLM),
        (PrunusMistralConfig, PrunusMistralModel, PrunusMistralForCausalLM),
        (PrunusQwen2Config, PrunusQwen2Model, PrunusQwen2ForCausalLM),
        (PrunusQwen3Config, PrunusQwen3Model, PrunusQwen3ForCausalLM),
        (PrunusGemma2Config, PrunusGemma2Model, PrunusGemma2ForCausalLM),
        (PrunusGemma3Config, PrunusGemma3Model, PrunusGemma3ForCausalLM),
        (PrunusOlmo2Config, PrunusOlmo2Model, PrunusOlmo2ForCausalLM),
        (PrunusPhiConfig, PrunusPhiModel, PrunusPhiForCausalLM),
        (PrunusPhi3Config, PrunusPhi3Model, PrunusPhi3ForCausalLM),
        (PrunusGPTNeoXConfig, PrunusGPTNeoXModel, PrunusGPTNeoXForCausalLM),
        (PrunusOPTConfig, PrunusOPTModel, PrunusOPTForCausalLM),
        (PrunusGPT2Config, PrunusGPT2Model, PrunusGPT2ForCausalLM),
    )
}


def register() -> None:
    """Tell transformers' Auto classes about these, so that `trust_remote_code` is not needed in this process."""
    for model_type, (config, model, causal) in CLASSES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


if __name__ == "prunus.models.ragged":
    register()
