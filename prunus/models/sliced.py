"""Language models whose residual stream is rotated and cut, after SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024).

This file needs only torch and transformers. Prunus copies it into such a checkpoint as `modeling_prunus_sliced.py`, so
that `from_pretrained(..., trust_remote_code=True)` works where Prunus is not installed.

Between any two sub-layers the stream lives in a rotation of its own and has `sliced_size` channels; two matrices of
each layer carry it from one rotation to the next, or one where attention and MLP read the same stream. The norms have
no weights (these are in the matrices that read them) and divide by the size that the stream had before the cut. A layer
norm's subtraction of the mean is in the matrices that write. After the last layer the stream is whole again, so that
the final norm and the output matrix are the dense model's.
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
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.pytorch_utils import Conv1D

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

    attention_path: str = "self_attn"
    mlp_paths: tuple[str, ...] = ("mlp",)  # modules that run one after the other
    attention_writer: str = "self_attn.o_proj"
    mlp_writer: str = "mlp.down_proj"
    norm: str = "input_layernorm"  # has the eps of both
    one_head: bool = False  # the stock attention takes a head's size from the hidden size: built with one, then fitted

    def __init__(self, config: Any, i: int, stock: type[nn.Module], model_config: Any) -> None:
        super().__init__()
        own = copy.copy(config)
        own.hidden_size = narrow = config.sliced_size
        if getattr(own, "n_inner", 0) is None:  # GPT-2's MLP would follow the cut
            own.n_inner = 4 * config.hidden_size
        if self.one_head:
            own.num_attention_heads = 1
        built: Any = stock(own, i)
        self.parallel = self._parallel(config)
        for path in (self.attention_path, *self.mlp_paths):
            setattr(self, path, getattr(built, path))
        attention: Any = getattr(self, self.attention_path)
        self._fit(attention, config)
        attention.config = model_config  # the attention implementation is asked of the model's, live
        out = config.hidden_size if i == config.num_layers_in_all - 1 else narrow
        if out != narrow:
            for path in (self.attention_writer, self.mlp_writer) if self.parallel else (self.mlp_writer,):
                self.set_submodule(path, _widened(self.get_submodule(path), out))
        if not self.parallel:
            self.attention_shortcut = nn.Linear(narrow, narrow, bias=False)
        self.mlp_shortcut = nn.Linear(narrow, out, bias=False)
        norm: Any = built.get_submodule(self.norm)
        eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        self.sliced_norm = SlicedNorm(config.hidden_size, eps)

    def _parallel(self, config: Any) -> bool:
        """Whether attention and MLP read the same stream."""
        return False

    def _fit(self, attention: Any, config: Any) -> None:
        """Give a stock attention the head sizes that its configuration cannot tell it (**in place**)."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        read = self.sliced_norm(hidden_states)
        added, _ = getattr(self, self.attention_path)(hidden_states=read, **kwargs)
        if not self.parallel:
            hidden_states = self.attention_shortcut(hidden_states) + added
            read, added = self.sliced_norm(hidden_states), 0
        for path in self.mlp_paths:
            read = getattr(self, path)(read)
        result: Tensor = self.mlp_shortcut(hidden_states) + added + read
        return result


def _widened(writer: Any, out: int) -> nn.Module:
    """A matrix of the same kind and inputs with `out` outputs."""
    if isinstance(writer, Conv1D):
        return Conv1D(out, writer.weight.shape[0])
    return nn.Linear(writer.in_features, out, bias=writer.bias is not None)


class SlicedOPTLayer(SlicedLayer):
    mlp_paths = ("fc1", "activation_fn", "fc2")
    attention_writer, mlp_writer = "self_attn.out_proj", "fc2"
    norm = "self_attn_layer_norm"
    one_head = True

    def _fit(self, attention: Any, config: Any) -> None:
        inner, narrow, bias = config.num_attention_heads * config.head_dim, config.sliced_size, config.enable_bias
        attention.num_heads, attention.head_dim = config.num_attention_heads, config.head_dim
        attention.scaling = config.head_dim**-0.5
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, nn.Linear(narrow, inner, bias=bias))
        attention.out_proj = nn.Linear(inner, narrow, bias=bias)


class SlicedGPT2Layer(SlicedLayer):
    attention_path = "attn"
    attention_writer, mlp_writer = "attn.c_proj", "mlp.c_proj"
    norm = "ln_1"
    one_head = True

    def _fit(self, attention: Any, config: Any) -> None:
        inner, narrow = config.num_attention_heads * config.head_dim, config.sliced_size
        attention.num_heads, attention.head_dim, attention.split_size = (
            config.num_attention_heads,
            config.head_dim,
            inner,
        )
        attention.scaling = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            attention.scaling /= float(attention.layer_idx + 1)
        attention.c_attn, attention.c_proj = Conv1D(3 * inner, narrow), Conv1D(narrow, inner)

    def forward(  # the stock model gives the first ones by position
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: None = None,
        **kwargs: Any,
    ) -> Tensor:
        narrow = hidden_states[..., : self.mlp_shortcut.in_features]
        return super().forward(narrow, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)


class SlicedPhiLayer(SlicedLayer):
    attention_writer, mlp_writer = "self_attn.dense", "mlp.fc2"

    def _parallel(self, config: Any) -> bool:
        return True

    def _fit(self, attention: Any, config: Any) -> None:
        if attention.qk_layernorm:  # the stock class sizes them hidden size / heads
            attention.q_layernorm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
            attention.k_layernorm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)


class SlicedGPTNeoXLayer(SlicedLayer):
    attention_path = "attention"
    attention_writer, mlp_writer = "attention.dense", "mlp.dense_4h_to_h"
    one_head = True

    def _parallel(self, config: Any) -> bool:
        return bool(config.use_parallel_residual)

    def _fit(self, attention: Any, config: Any) -> None:
        inner, narrow, bias = config.num_attention_heads * config.head_dim, config.sliced_size, config.attention_bias
        attention.head_size, attention.scaling = config.head_dim, config.head_dim**-0.5
        attention.rotary_ndims = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        attention.query_key_value = nn.Linear(narrow, 3 * inner, bias=bias)
        attention.dense = nn.Linear(inner, narrow, bias=bias)


class Padded(nn.Module):
    """Zeros beside what the embeddings give: GPT-2's model takes the width of its output from there."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, self.size - x.shape[-1]))


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
    sliced_layer: type[SlicedLayer] = SlicedLayer
    layers_path: str = "layers"  # seen from the base model, as the tables are
    tables: tuple[str, ...] = ("embed_tokens",)  # embeddings, which are cut

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
        for path in self.tables:
            table = base.get_submodule(path)
            table.weight = nn.Parameter(table.weight.new_empty(table.num_embeddings, config.sliced_size))
            table.embedding_dim = config.sliced_size
        layers = [self.sliced_layer(own, i, self.stock_layer, config) for i in range(n)]
        base.get_submodule(self.layers_path).extend(layers)
        self._frame(base, config)
        me.post_init()

    def _frame(self, base: Any, config: Any) -> None:
        """What else the base model needs (**in place**)."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and this file beside it, so that the copy loads like the original."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        source = Path(str(sys.modules[SlicedModel.__module__].__file__))
        target = Path(save_directory) / f"{MODULE}.py"
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)


class _OPT(SlicedModel):
    stock_layer = OPTDecoderLayer
    sliced_layer = SlicedOPTLayer
    layers_path = "decoder.layers"
    tables = ("decoder.embed_tokens", "decoder.embed_positions")


class _GPT2(SlicedModel):
    stock_layer = GPT2Block
    sliced_layer = SlicedGPT2Layer
    layers_path = "h"
    tables = ("wte", "wpe")

    def _frame(self, base: Any, config: Any) -> None:
        base.drop = Padded(config.hidden_size)


class _Phi(SlicedModel):
    stock_layer = PhiDecoderLayer
    sliced_layer = SlicedPhiLayer


class _GPTNeoX(SlicedModel):
    stock_layer = GPTNeoXLayer
    sliced_layer = SlicedGPTNeoXLayer
    tables = ("embed_in",)


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


class PrunusSlicedPhiConfig(SlicedConfig, PhiConfig):
    model_type = "prunus_sliced_phi"
    sliced_size: int = 0


class PrunusSlicedPhiModel(_Phi, PhiModel):
    config_class = PrunusSlicedPhiConfig


class PrunusSlicedPhiForCausalLM(_Phi, PhiForCausalLM):
    config_class = PrunusSlicedPhiConfig


class PrunusSlicedGPTNeoXConfig(SlicedConfig, GPTNeoXConfig):
    model_type = "prunus_sliced_gpt_neox"
    sliced_size: int = 0


class PrunusSlicedGPTNeoXModel(_GPTNeoX, GPTNeoXModel):
    config_class = PrunusSlicedGPTNeoXConfig


class PrunusSlicedGPTNeoXForCausalLM(_GPTNeoX, GPTNeoXForCausalLM):
    config_class = PrunusSlicedGPTNeoXConfig


class PrunusSlicedOPTConfig(SlicedConfig, OPTConfig):
    model_type = "prunus_sliced_opt"
    sliced_size: int = 0


class PrunusSlicedOPTModel(_OPT, OPTModel):
    config_class = PrunusSlicedOPTConfig


class PrunusSlicedOPTForCausalLM(_OPT, OPTForCausalLM):
    config_class = PrunusSlicedOPTConfig


class PrunusSlicedGPT2Config(SlicedConfig, GPT2Config):
    model_type = "prunus_sliced_gpt2"
    sliced_size: int = 0


class PrunusSlicedGPT2Model(_GPT2, GPT2Model):
    config_class = PrunusSlicedGPT2Config


class PrunusSlicedGPT2ForCausalLM(_GPT2, GPT2LMHeadModel):
    config_class = PrunusSlicedGPT2Config


CLASSES: dict[str, tuple[type, type, type]] = {
    config.model_type: (config, model, causal)
    for config, model, causal in (
        (PrunusSlicedLlamaConfig, PrunusSlicedLlamaModel, PrunusSlicedLlamaForCausalLM),
        (PrunusSlicedMistralConfig, PrunusSlicedMistralModel, PrunusSlicedMistralForCausalLM),
        (PrunusSlicedQwen2Config, PrunusSlicedQwen2Model, PrunusSlicedQwen2ForCausalLM),
        (PrunusSlicedQwen3Config, PrunusSlicedQwen3Model, PrunusSlicedQwen3ForCausalLM),
        (PrunusSlicedPhi3Config, PrunusSlicedPhi3Model, PrunusSlicedPhi3ForCausalLM),
        (PrunusSlicedPhiConfig, PrunusSlicedPhiModel, PrunusSlicedPhiForCausalLM),
        (PrunusSlicedGPTNeoXConfig, PrunusSlicedGPTNeoXModel, PrunusSlicedGPTNeoXForCausalLM),
        (PrunusSlicedOPTConfig, PrunusSlicedOPTModel, PrunusSlicedOPTForCausalLM),
        (PrunusSlicedGPT2Config, PrunusSlicedGPT2Model, PrunusSlicedGPT2ForCausalLM),
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
