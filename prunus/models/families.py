"""Floor 1: which axis of which weight is which dimension. One table per family, and nothing else about models.

Everything derives from these tables: check, count, importance, sort, activate, extract, LoRA targets, export.
A row reads `module path: "input axis -> output axis"`, or one axis for a norm. Fused weights are sums of axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from prunus.errors import UserError
from prunus.subnetwork import LayerShape, SubNetwork

AXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {  # an axis is a product of dimensions, outermost first; RoPE pairs live inside head_dim, which is never cut
        "vocab": ("vocab",),
        "positions": ("positions",),
        "hidden": ("hidden",),
        "mlp": ("mlp",),
        "head_dim": ("head_dim",),
        "q": ("kv_heads", "q_per_kv", "head_dim"),
        "kv": ("kv_heads", "head_dim"),
        "qkv_by_head": ("kv_heads", "q_per_kv", "three", "head_dim"),  # GPT-NeoX: rows are (head, q|k|v, head_dim)
        "heads": ("kv_heads", "q_per_kv"),  # counts, for attributes that a forward reads
        "kv_heads": ("kv_heads",),
        "q_per_kv": ("q_per_kv",),
    }
)
Part = Literal["outer", "block", "attention", "mlp"]
UNCUT = "uncut"  # an axis that no sub-network cuts (the rank of a LoRA update)


@dataclass(frozen=True)
class Family:
    """One architecture: where its layers are, and what every axis of every weight means."""

    name: str
    model_types: tuple[str, ...]
    layers: str  # path of the ModuleList of decoder layers
    outer: Mapping[str, str]  # rows outside the layers
    attention: Mapping[str, str]  # rows that leave together with the attention sub-layer, its norms included
    mlp: Mapping[str, str]  # rows that leave together with the MLP sub-layer
    attention_module: str  # replaced by a module that adds nothing where the attention is dropped
    mlp_modules: tuple[str, ...]  # the same for the MLP
    attention_writer: str  # the module whose *input* is the attention's inner axis
    mlp_writer: str
    final_norm: str
    block: Mapping[str, str] = field(default_factory=dict)  # rows that both sub-layers read
    sizes: Mapping[str, str] = field(default_factory=dict)  # attributes that a forward reads: path -> axis
    config_sizes: Mapping[str, str] = field(default_factory=dict)  # config keys that an attention's forward reads
    roots: Mapping[str, str] = field(default_factory=dict)  # constants that are the square root of an axis
    keys: Mapping[str, str] = field(default_factory=dict)  # dimension -> its key in config.json, where unusual
    post_norm: bool = False  # a norm stands between a writer and the residual stream
    parallel: bool = False  # attention and MLP read the same residual stream
    stock_heads: bool = True  # the stock config can hold a head count that does not follow from the hidden size
    bias_keys: Mapping[str, str] = field(default_factory=dict)  # writer -> config key that gives it a bias

    @property
    def inner(self) -> dict[str, str]:
        """All rows of one decoder layer."""
        return {**self.block, **self.attention, **self.mlp}

    @property
    def embedding(self) -> str:
        """Path of the token embedding."""
        return next(path for path, row in self.outer.items() if row == "vocab -> hidden")

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Last path components of the weight matrices in the layers: what LoRA attaches to."""
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path, row in self.inner.items() if "->" in row))

    def key(self, dimension: str) -> str:
        """How config.json spells a dimension."""
        usual = {
            "hidden": "hidden_size",
            "mlp": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "layers": "num_hidden_layers",
            "positions": "max_position_embeddings",
        }
        return self.keys.get(dimension, usual[dimension])


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    layers="model.layers",
    outer={"model.embed_tokens": "vocab -> hidden", "model.norm": "hidden", "lm_head": "hidden -> vocab"},
    attention={
        "input_layernorm": "hidden",
        "self_attn.q_proj": "hidden -> q",
        "self_attn.k_proj": "hidden -> kv",
        "self_attn.v_proj": "hidden -> kv",
        "self_attn.o_proj": "q -> hidden",
    },
    mlp={
        "post_attention_layernorm": "hidden",
        "mlp.gate_proj": "hidden -> mlp",
        "mlp.up_proj": "hidden -> mlp",
        "mlp.down_proj": "mlp -> hidden",
    },
    attention_module="self_attn",
    mlp_modules=("mlp",),
    attention_writer="self_attn.o_proj",
    mlp_writer="mlp.down_proj",
    final_norm="model.norm",
    sizes={"self_attn.num_key_value_groups": "q_per_kv"},
)

_HEAD_NORMS = {"self_attn.q_norm": "head_dim", "self_attn.k_norm": "head_dim"}
_GEMMA_NORMS = {"pre_feedforward_layernorm": "hidden", "post_feedforward_layernorm": "hidden"}


def _without(rows: Mapping[str, str], *paths: str) -> dict[str, str]:
    return {path: row for path, row in rows.items() if path not in paths}


QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",), attention={**LLAMA.attention, **_HEAD_NORMS})

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    model_types=("gemma2",),
    attention={**LLAMA.attention, "post_attention_layernorm": "hidden"},
    mlp={**_without(LLAMA.mlp, "post_attention_layernorm"), **_GEMMA_NORMS},
    roots={"model.embed_tokens.embed_scale": "hidden"},  # embeddings are multiplied by sqrt(hidden)
    post_norm=True,
)

GEMMA3 = replace(GEMMA2, name="gemma3", model_types=("gemma3_text",), attention={**GEMMA2.attention, **_HEAD_NORMS})

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    attention={
        **_without(LLAMA.attention, "input_layernorm"),
        "self_attn.q_norm": "q",
        "self_attn.k_norm": "kv",
        "post_attention_layernorm": "hidden",
    },
    mlp={**_without(LLAMA.mlp, "post_attention_layernorm"), "post_feedforward_layernorm": "hidden"},
    post_norm=True,
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    attention={
        "input_layernorm": "hidden",
        "self_attn.qkv_proj": "hidden -> q+kv+kv",
        "self_attn.o_proj": "q -> hidden",
    },
    mlp={
        "post_attention_layernorm": "hidden",
        "mlp.gate_up_proj": "hidden -> mlp+mlp",
        "mlp.down_proj": "mlp -> hidden",
    },
    sizes={"self_attn.num_key_value_groups": "q_per_kv", "self_attn.num_key_value_heads": "kv_heads"},
    config_sizes={"num_attention_heads": "heads"},
)

PHI = Family(
    name="phi",
    model_types=("phi",),
    layers="model.layers",
    outer={"model.embed_tokens": "vocab -> hidden", "model.final_layernorm": "hidden", "lm_head": "hidden -> vocab"},
    block={"input_layernorm": "hidden"},
    attention={
        "self_attn.q_proj": "hidden -> q",
        "self_attn.k_proj": "hidden -> kv",
        "self_attn.v_proj": "hidden -> kv",
        "self_attn.dense": "q -> hidden",
        "self_attn.q_layernorm": "head_dim",
        "self_attn.k_layernorm": "head_dim",
    },
    mlp={"mlp.fc1": "hidden -> mlp", "mlp.fc2": "mlp -> hidden"},
    attention_module="self_attn",
    mlp_modules=("mlp",),
    attention_writer="self_attn.dense",
    mlp_writer="mlp.fc2",
    final_norm="model.final_layernorm",
    sizes={"self_attn.num_key_value_groups": "q_per_kv"},
    parallel=True,
)

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    outer={
        "gpt_neox.embed_in": "vocab -> hidden",
        "gpt_neox.final_layer_norm": "hidden",
        "embed_out": "hidden -> vocab",
        "lm_head": "hidden -> vocab",
    },
    attention={
        "input_layernorm": "hidden",
        "attention.query_key_value": "hidden -> qkv_by_head",
        "attention.dense": "q -> hidden",
    },
    mlp={
        "post_attention_layernorm": "hidden",
        "mlp.dense_h_to_4h": "hidden -> mlp",
        "mlp.dense_4h_to_h": "mlp -> hidden",
    },
    attention_module="attention",
    mlp_modules=("mlp",),
    attention_writer="attention.dense",
    mlp_writer="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    parallel=True,
    stock_heads=False,
)

OPT = Family(
    name="opt",
    model_types=("opt",),
    layers="model.decoder.layers",
    outer={
        "model.decoder.embed_tokens": "vocab -> hidden",
        "model.decoder.embed_positions": "positions -> hidden",
        "model.decoder.final_layer_norm": "hidden",
        "lm_head": "hidden -> vocab",
    },
    attention={
        "self_attn_layer_norm": "hidden",
        "self_attn.q_proj": "hidden -> q",
        "self_attn.k_proj": "hidden -> kv",
        "self_attn.v_proj": "hidden -> kv",
        "self_attn.out_proj": "q -> hidden",
    },
    mlp={"final_layer_norm": "hidden", "fc1": "hidden -> mlp", "fc2": "mlp -> hidden"},
    attention_module="self_attn",
    mlp_modules=("fc1", "fc2"),
    attention_writer="self_attn.out_proj",
    mlp_writer="fc2",
    final_norm="model.decoder.final_layer_norm",
    sizes={"self_attn.num_heads": "heads"},
    keys={"mlp": "ffn_dim"},
    stock_heads=False,
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    layers="transformer.h",
    outer={
        "transformer.wte": "vocab -> hidden",
        "transformer.wpe": "positions -> hidden",
        "transformer.ln_f": "hidden",
        "lm_head": "hidden -> vocab",
    },
    attention={"ln_1": "hidden", "attn.c_attn": "hidden -> q+kv+kv", "attn.c_proj": "q -> hidden"},
    mlp={"ln_2": "hidden", "mlp.c_fc": "hidden -> mlp", "mlp.c_proj": "mlp -> hidden"},
    attention_module="attn",
    mlp_modules=("mlp",),
    attention_writer="attn.c_proj",
    mlp_writer="mlp.c_proj",
    final_norm="transformer.ln_f",
    sizes={"attn.split_size": "q", "attn.num_heads": "heads"},
    keys={"mlp": "n_inner", "hidden": "n_embd", "heads": "n_head", "layers": "n_layer", "positions": "n_positions"},
    stock_heads=False,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {t: f for f in (LLAMA, QWEN3, GEMMA2, GEMMA3, OLMO2, PHI, PHI3, GPT_NEOX, OPT, GPT2) for t in f.model_types}
)


def family_of(config: Any) -> Family:
    """The table of a Hugging Face config; raises UserError for an unknown `model_type`, never guesses."""
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type).removeprefix("prunus_").removeprefix("sliced_"))
    if family is None:
        raise UserError(
            f"no family table for model_type {model_type!r}. Known: {', '.join(sorted(FAMILIES))}. "
            "To add one, write its axis table in prunus/models/families.py (CONTRIBUTING.md shows how); "
            "`prunus.check` then names what the table still misses"
        )
    if family is OPT and not getattr(config, "do_layer_norm_before", True):
        raise UserError(
            "this OPT model (opt-350m's layout: do_layer_norm_before=false) applies its norms after the residual sum, "
            "which the opt table does not describe; use another OPT size"
        )
    return family


def dims(config: Any, layer: LayerShape | None = None, hidden: int | None = None) -> dict[str, int]:
    """Every dimension of the super-network, or of one layer of a sub-network (widths replace the config's)."""
    family = family_of(config)
    heads = int(config.num_attention_heads)
    size = int(config.hidden_size)
    extra_positions = 2 if family is OPT else 0  # OPT's position table starts at an offset of 2
    whole = {
        "vocab": int(config.vocab_size),
        "hidden": size,
        "mlp": int(getattr(config, family.key("mlp"), None) or 4 * size),
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or size // heads),
        "positions": int(getattr(config, "max_position_embeddings", 0)) + extra_positions,
        "three": 3,
    }
    whole["q_per_kv"] = heads // whole["kv_heads"]
    if layer is not None:
        whole |= {"kv_heads": layer.kv_heads, "q_per_kv": layer.q_per_kv, "mlp": layer.mlp}
    if hidden is not None:
        whole["hidden"] = hidden
    return whole


def full(config: Any) -> SubNetwork:
    """The sub-network that keeps everything."""
    d = dims(config)
    return SubNetwork(
        d["hidden"], (LayerShape(d["kv_heads"], d["q_per_kv"], d["mlp"]),) * int(config.num_hidden_layers)
    )


def size_of(axis: str, d: Mapping[str, int]) -> int:
    """Length of an axis (a sum of products of dimensions) for the given dimensions."""
    total = 0
    for part in axis.split("+"):
        n = 1
        for dimension in AXES[part]:
            n *= d[dimension]
        total += n
    return total


def is_dropped(part: Part, shape: LayerShape | None) -> bool:
    """True if a row of this part is gone in a layer of this shape."""
    if shape is None or part == "outer":
        return False
    if part == "attention":
        return not shape.attends
    if part == "mlp":
        return not shape.mlp
    return not shape.attends and not shape.mlp
