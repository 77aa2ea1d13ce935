"""Tiny random models of every family: norms and biases random too, so that errors cannot hide behind ones and zeros."""

from __future__ import annotations

import random

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from prunus.models.families import dims
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

COMMON = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GQA = dict(COMMON, num_key_value_heads=4)
MQA = dict(COMMON, num_key_value_heads=1)


def _opt() -> OPTConfig:
    raw = dict(COMMON, ffn_dim=80, word_embed_proj_dim=48)
    del raw["intermediate_size"]
    return OPTConfig(**raw)


CONFIGS = {
    "llama": lambda: LlamaConfig(**GQA, head_dim=8),
    "llama-mqa-tied-bias": lambda: LlamaConfig(
        **MQA, head_dim=8, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: MistralConfig(**GQA, head_dim=8, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**GQA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**GQA, head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**GQA, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(**GQA, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
    "olmo2": lambda: Olmo2Config(**GQA),
    "phi": lambda: PhiConfig(**GQA, partial_rotary_factor=0.67, qk_layernorm=True),
    "phi3": lambda: Phi3Config(**GQA, sliding_window=None),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, rotary_pct=0.67),
    "opt": _opt,
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=48, n_inner=80, n_layer=4, n_head=8, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny random model of a family, in evaluation mode, eager attention, on the CPU."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    """Random token ids without special tokens."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged(config: object, seed: int = 0, hidden: bool = True) -> SubNetwork:
    """Different widths in every layer, one attention and one MLP dropped, half the hidden size."""
    rng, d = random.Random(seed), dims(config)
    layers = [
        LayerShape(rng.randint(1, d["kv_heads"]), rng.randint(1, d["q_per_kv"]), rng.randint(1, d["mlp"]))
        for _ in range(config.num_hidden_layers)  # type: ignore[attr-defined]
    ]
    layers[2] = LayerShape(0, 0, 7)
    layers[3] = LayerShape(1, 1, 0)
    return SubNetwork(d["hidden"] // 2 if hidden else d["hidden"], tuple(layers))


def indexed(config: object, seed: int = 0) -> SubNetwork:
    """A sub-network whose members are named, not a prefix."""
    rng, d = random.Random(seed), dims(config)
    layers, kept = [], []
    for _ in range(config.num_hidden_layers):  # type: ignore[attr-defined]
        shape = LayerShape(rng.randint(1, d["kv_heads"]), rng.randint(1, d["q_per_kv"]), rng.randint(1, d["mlp"]))
        layers.append(shape)
        kept.append(
            LayerKept(*(tuple(rng.sample(range(d[u]), getattr(shape, u))) for u in ("kv_heads", "q_per_kv", "mlp")))
        )
    return SubNetwork(d["hidden"], tuple(layers), tuple(kept))
