"""Floor 1: which GGUF architecture of llama.cpp can hold which family, and what it calls every weight.

One table per architecture, and for every family the architectures to try, in order: its own first, then one that takes
the widths of each layer as arrays. What an architecture's graph assumes (one shape for all layers, heads x head size =
hidden size, tied embeddings, ...) is a field of its table, so that a model that it cannot hold is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from prunus.errors import UserError
from prunus.models.families import Family, dims, family_of
from prunus.subnetwork import LayerShape

# In a row, `a + b` stacks two modules, `a[1]` is the second part of a fused one (the parts that the family names).
Rows = Mapping[str, str]


@dataclass(frozen=True)
class Architecture:
    """What one GGUF architecture holds and computes, as far as our families differ in it."""

    name: str
    outer: Rows  # tensor -> module outside the layers; the output matrix is not among them
    attention: Rows  # tensor of a layer -> modules
    mlp: Rows
    activation: tuple[str, ...]  # Hugging Face's names for what its MLP computes
    output: Literal["optional", "required", "tied"] = "optional"
    biases: tuple[str, ...] = ()  # tensors that may have one
    always_biases: tuple[str, ...] = ()  # tensors that must have one, zeros if need be
    layer_norm: bool = False
    norm_offset: float = 0.0  # Gemma keeps its norms' weights less one
    pairs: tuple[str, ...] = ()  # tensors whose rows RoPE turns as neighbours (2 i, 2 i + 1), not as halves
    per_layer: bool = False  # the widths of each layer are its own
    attention_free: bool = False  # a layer may have no attention, but for the first
    square: bool = False  # heads x head size must be the hidden size
    partial_rotary: bool = False
    rotary: bool = True
    rope_types: tuple[str, ...] = ("default", "linear")
    windows: bool = False  # layers may see a sliding window
    caps: tuple[str, ...] = ()  # which of attention and final its graph caps


_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_SPLIT = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

LLAMA = Architecture(
    name="llama",
    outer={"token_embd": "model.embed_tokens", "output_norm": "model.norm"},
    attention={"attn_norm": "input_layernorm", **_SPLIT, "attn_output": "self_attn.o_proj"},
    mlp={"ffn_norm": "post_attention_layernorm", **_GATED},
    activation=("silu", "swish"),
    biases=(*_SPLIT, "attn_output", *_GATED),
    pairs=("attn_q", "attn_k"),
    rope_types=("default", "linear", "llama3", "longrope"),
)
DECI = replace(LLAMA, name="deci", per_layer=True, attention_free=True)
QWEN2 = replace(LLAMA, name="qwen2", biases=tuple(_SPLIT), pairs=(), square=True, rope_types=Architecture.rope_types)
QWEN3 = replace(QWEN2, name="qwen3", attention={**LLAMA.attention, **_HEAD_NORMS}, square=False)
OPENELM = replace(
    QWEN3,
    name="openelm",
    attention={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        **_HEAD_NORMS,
    },
    biases=(),
    output="tied",
    per_layer=True,
)
_FUSED_PHI3 = {
    "attn_q": "self_attn.qkv_proj[0]",
    "attn_k": "self_attn.qkv_proj[1]",
    "attn_v": "self_attn.qkv_proj[2]",
}
_GATED_PHI3 = {"ffn_gate": "mlp.gate_up_proj[0]", "ffn_up": "mlp.gate_up_proj[1]", "ffn_down": "mlp.down_proj"}
PHI3 = replace(
    LLAMA,
    name="phi3",
    attention={"attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"},
    mlp={"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
    biases=(),
    pairs=(),
    square=True,
    partial_rotary=True,
    rope_types=("default", "linear", "longrope"),
)
_UNFUSED = {"attention": {**LLAMA.attention, **_FUSED_PHI3}, "mlp": {**LLAMA.mlp, **_GATED_PHI3}}
LLAMA_OF_PHI3 = replace(LLAMA, **_UNFUSED)  # type: ignore[arg-type]
DECI_OF_PHI3 = replace(DECI, **_UNFUSED)  # type: ignore[arg-type]
GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    attention={**LLAMA.attention, "post_attention_norm": "post_attention_layernorm"},
    mlp={"ffn_norm": "pre_feedforward_layernorm", **_GATED, "post_ffw_norm": "post_feedforward_layernorm"},
    activation=("gelu_pytorch_tanh",),
    output="tied",
    biases=tuple(_SPLIT),
    norm_offset=1.0,
    pairs=(),
    partial_rotary=False,
    rope_types=Architecture.rope_types,
    windows=True,
    caps=("attention", "final"),
)
GEMMA3 = replace(
    GEMMA2, name="gemma3", attention={**GEMMA2.attention, **_HEAD_NORMS}, output="optional", caps=("final",)
)
OLMO2 = replace(
    LLAMA,
    name="olmo2",
    attention={
        **_SPLIT, "attn_output": "self_attn.o_proj", **_HEAD_NORMS, "post_attention_norm": "post_attention_layernorm"
    },
    mlp={**_GATED, "post_ffw_norm": "post_feedforward_layernorm"},
    output="required",
    biases=tuple(_SPLIT),
    pairs=(),
    square=True,
    rope_types=Architecture.rope_types,
)  # fmt: skip
PHI2 = Architecture(
    name="phi2",
    outer={"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm"},
    attention={"attn_norm": "input_layernorm", **_SPLIT, "attn_output": "self_attn.dense"},
    mlp={"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    activation=("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    output="required",
    biases=("output", *_SPLIT, "attn_output", "ffn_up", "ffn_down"),
    always_biases=("output",),
    layer_norm=True,
    square=True,
    partial_rotary=True,
)
GPTNEOX = Architecture(
    name="gptneox",
    outer={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm"},
    attention={
        "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"
    },
    mlp={"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
    activation=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    output="required",
    biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    always_biases=("attn_qkv", "attn_output"),
    layer_norm=True,
    square=True,
    partial_rotary=True,
)  # fmt: skip
GPT2 = replace(
    GPTNEOX,
    name="gpt2",
    outer={
        "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f"
    },
    attention={"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"},
    mlp={"ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    output="optional",
    always_biases=(),
    rotary=False,
    partial_rotary=False,
)  # fmt: skip

CARRIERS: Mapping[str, tuple[Architecture, ...]] = MappingProxyType(
    {  # model_type -> architectures to try, in order
        "llama": (LLAMA, DECI),
        "mistral": (LLAMA, DECI),
        "qwen2": (QWEN2, LLAMA, DECI),
        "qwen3": (QWEN3, OPENELM),
        "phi3": (PHI3, LLAMA_OF_PHI3, DECI_OF_PHI3),
        "gemma2": (GEMMA2,),
        "gemma3_text": (GEMMA3,),
        "olmo2": (OLMO2,),
        "phi": (PHI2,),
        "gpt_neox": (GPTNEOX,),
        "gpt2": (GPT2,),
    }
)


@dataclass(frozen=True)
class Shapes:
    """What an architecture has to hold: the sizes of a checkpoint, uniform or ragged."""

    model_type: str  # of the family, without `prunus_`
    family: Family
    hidden: int
    head_dim: int
    layers: tuple[LayerShape, ...]
    sizes: tuple[dict[str, int], ...] = field(repr=False, default=())  # every dimension of each layer

    @property
    def alike(self) -> bool:
        """True if all layers have both sub-layers and the same widths."""
        return len(set(self.layers)) == 1 and self.layers[0].attends and self.layers[0].mlp > 0


def shapes_of(config: Any) -> Shapes:
    """The sizes of a checkpoint from its configuration: a stock one, or one of `prunus.models.ragged`."""
    family = family_of(config)
    n = int(config.num_hidden_layers)
    own = [config.per_layer_config[i] for i in range(n)] if str(config.model_type).startswith("prunus_") else [config]
    sizes, layers = [], []
    for one in own if len(own) == n else own * n:
        skip, d = getattr(one, "skip", ()), dims(one)
        heads = (0, 0) if "attention" in skip else (d["kv_heads"], d["q_per_kv"])
        layers.append(LayerShape(*heads, 0 if "mlp" in skip else d["mlp"]))
        sizes.append(d)
    model_type = str(config.model_type).removeprefix("prunus_")
    return Shapes(model_type, family, sizes[0]["hidden"], sizes[0]["head_dim"], tuple(layers), tuple(sizes))


def carrier(config: Any, tied: bool) -> Architecture:
    """The first architecture that holds the model; raises UserError with the reason of each that does not.

    tied: the output matrix is the embedding.
    """
    shapes = shapes_of(config)
    known = CARRIERS.get(shapes.model_type)
    if known is None:
        raise UserError(
            f"llama.cpp has no architecture for model_type {shapes.model_type!r}, so it cannot be exported as GGUF. It "
            f"has one for: {', '.join(CARRIERS)}. The checkpoint itself runs in transformers"
        )
    reasons: dict[str, str] = {}  # each said once, for the first architecture that it keeps out
    for one in known:
        refusal = _refusal(one, config, shapes, tied)
        if refusal is None:
            return one
        reasons.setdefault(refusal, one.name)
    listed = "; ".join(f"{name}: {refusal}" for refusal, name in reasons.items())
    raise UserError(
        f"no architecture of llama.cpp can hold this {shapes.model_type} model ({listed}). {_advice(known, shapes)}"
    )


def _advice(known: Sequence[Architecture], shapes: Shapes) -> str:
    if not shapes.alike:
        return "Compress with --uniform to get layers that are alike, or run the checkpoint in transformers"
    return "Run the checkpoint in transformers"


def _refusal(one: Architecture, config: Any, shapes: Shapes, tied: bool) -> str | None:
    if not shapes.alike and not one.per_layer:
        return "it has one width for all layers, and here they differ or lack a sub-layer"
    for shape in shapes.layers:
        inner = shape.kv_heads * shape.q_per_kv * shapes.head_dim
        if one.square and inner != shapes.hidden:
            return f"it wants heads x head size = hidden size, and here {inner} is not {shapes.hidden}"
    if one.attention_free and not shapes.layers[0].attends:
        return "its first layer must keep its attention"
    if one.output == "tied" and not tied:
        return "its output matrix is its embedding, and here they are two"
    return _refused_formula(one, config, shapes)


def _refused_formula(one: Architecture, config: Any, shapes: Shapes) -> str | None:
    """Why the graph would compute something else than the model, whatever its sizes."""
    activation = next(str(v) for k in _ACTIVATIONS if (v := getattr(config, k, None)))
    if activation not in one.activation:
        return f"its MLP computes {one.activation[0]}, not {activation}"
    rope = rope_of(config)
    if one.rotary and rope.get("rope_type", "default") not in one.rope_types:
        return f"it knows RoPE of type {', '.join(one.rope_types)}, not {rope['rope_type']}"
    if one.rotary and not one.partial_rotary and rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "it turns whole heads, and here RoPE turns a part of each"
    for kind, key in _CAPS.items():
        cap = getattr(config, key, None)
        if cap and kind not in one.caps:
            return f"it has no {key}, and here it is {cap}"
        if not cap and kind in one.caps and one.output == "tied":
            return f"it always caps its {kind} logits, and here {key} is not set"
    if getattr(config, "qk_layernorm", False):
        return "it has no norms on queries and keys (qk_layernorm)"
    if not getattr(config, "scale_attn_weights", True) or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "it divides attention scores by the root of the head size and by nothing else"
    return None


_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_CAPS = {"attention": "attn_logit_softcapping", "final": "final_logit_softcapping"}


def rope_of(config: Any) -> dict[str, Any]:
    """The RoPE of the layers that see all tokens, as transformers 5 spells it; {} where there is none."""
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope.get("full_attention", rope))


def query_scale(one: Architecture, config: Any, shapes: Shapes) -> float:
    """What queries are multiplied by so that the graph's own attention scale gives the model's."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return 1.0
    first = shapes.layers[0]
    largest = {"gemma2": 46, "gemma3": 62}.get(one.name)  # the depth at which llama.cpp takes them for the 27B models
    by_hidden = len(shapes.layers) == largest
    assumed = shapes.hidden // (first.kv_heads * first.q_per_kv) if by_hidden else shapes.head_dim
    return float((assumed / scalar) ** 0.5)
