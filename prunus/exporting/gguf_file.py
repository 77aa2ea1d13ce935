"""Floor 2: a GGUF file: what it says of the model beside the tensors, how it is written, and whether it is whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunus.errors import UserError
from prunus.exporting.architectures import Architecture, Shapes, rope_of
from prunus.exporting.gguf_tensors import QUANTS, STUB, Planned, encoded, n_bytes

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # llama.cpp's general.file_type
_QUANTIZATION_VERSION = 2


def describe(writer: Any, config: Any, one: Architecture, shapes: Shapes) -> None:
    """The keys by which llama.cpp builds the graph: sizes, RoPE, norms, windows, caps."""
    writer.add_block_count(len(shapes.layers))
    writer.add_context_length(context_length(config, one))
    writer.add_embedding_length(shapes.hidden)
    widths = [_widths(one, shape.kv_heads, shape.q_per_kv, shape.mlp) for shape in shapes.layers]
    heads, kv_heads, mlp = (list(column) for column in zip(*widths, strict=True))
    writer.add_head_count(heads if one.per_layer else heads[0])
    writer.add_head_count_kv(kv_heads if one.per_layer else kv_heads[0])
    writer.add_feed_forward_length(mlp if one.per_layer else mlp[0])
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_vocab_size(int(config.vocab_size))
    epsilon = next(v for k in _EPSILONS if (v := getattr(config, k, None)) is not None)
    (writer.add_layer_norm_eps if one.layer_norm else writer.add_layer_norm_rms_eps)(float(epsilon))
    if one.name == "gptneox":
        writer.add_parallel_residual(bool(config.use_parallel_residual))
    for kind, add in (("attention", writer.add_attn_logit_softcapping), ("final", writer.add_final_logit_softcapping)):
        if kind in one.caps and (cap := getattr(config, _CAPS[kind], None)):
            add(float(cap))
    _rope(writer, config, one, shapes)
    _windows(writer, config, one)


_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_CAPS = {"attention": "attn_logit_softcapping", "final": "final_logit_softcapping"}


def _widths(one: Architecture, kv_heads: int, q_per_kv: int, mlp: int) -> tuple[int, int, int]:
    """Heads, KV heads and neurons of a layer; sub-layers that add nothing have the least that can be built."""
    if not kv_heads and not one.attention_free:
        kv_heads = q_per_kv = 1
    return kv_heads * q_per_kv, kv_heads, mlp or STUB


def _rope(writer: Any, config: Any, one: Architecture, shapes: Shapes) -> None:
    if not one.rotary:
        return
    rope = rope_of(config)
    writer.add_rope_dimension_count(int(shapes.head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "longrope":
        import gguf

        old = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        ratio = float(rope.get("factor") or config.max_position_embeddings / old)
        scale = rope.get("attention_factor") or math.sqrt(1 + math.log(max(ratio, 1.0)) / math.log(old))
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(old)
        writer.add_rope_scaling_attn_factors(float(scale))
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))


_PERIODS = {"gemma2": 2, "gemma3": 6}  # of so many layers the last sees all tokens, unless the file says otherwise


def _windows(writer: Any, config: Any, one: Architecture) -> None:
    if not one.windows:
        return
    seen = [kind == "sliding_attention" for kind in config.layer_types]
    size = config.sliding_window
    if not any(seen):
        if one.name != "gemma2":
            return
        size, seen = (
            config.max_position_embeddings,
            [True] * len(seen),
        )  # its graph wants a window: one that hides nothing
    writer.add_sliding_window(int(size))
    if seen != [(i + 1) % _PERIODS[one.name] != 0 for i in range(len(seen))]:  # older releases know no other pattern
        writer.add_sliding_window_pattern(seen)


def window(config: Any, one: Architecture) -> int | None:
    """The sliding window that the model has and the architecture has not, if any."""
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = "sliding_attention" in kinds if kinds else bool(size)
    return int(size) if size and used and not one.windows else None


def context_length(config: Any, one: Architecture) -> int:
    """Tokens for which the graph computes what the model does: no more than a window that it does not know."""
    positions = int(config.max_position_embeddings)
    return min(positions, window(config, one) or positions)


def write(
    path: Path,
    name: str,
    one: Architecture,
    planned: Sequence[Planned],
    quant: str,
    fill: Callable[[Any], None],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write a GGUF file, one tensor in memory at a time. fill: adds what describes the model and its vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, one.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[quant])
        if quant in ("q8_0", "q4_0"):
            writer.add_quantization_version(_QUANTIZATION_VERSION)
        fill(writer)
        for tensor in planned:
            kind = gguf.GGMLQuantizationType[QUANTS[tensor.kind]]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes(tensor), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(encoded(tensor))
            advance(1)
    finally:
        writer.close()


def check(path: Path, planned: Sequence[Planned], free: bool = False) -> dict[str, str]:
    """Read the file back: every planned tensor with its shape and type, the tokens and the architecture's keys.

    free: another program chose the types, so that only names and shapes are planned. Returns the types by name.
    Raises UserError for the first that is not as it was meant.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    found = {t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name) for t in reader.tensors}
    types = {name: kind for name, (_, kind) in found.items()}
    wanted = {t.name: (tuple(t.shape), types.get(t.name, "") if free else QUANTS[t.kind]) for t in planned}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"the file that was written is not as it was meant: {name!r} should be {wanted.get(name)} and is "
                f"{found.get(name)}; write it again"
            )
    for key in ("general.architecture", "tokenizer.ggml.tokens"):
        if key not in reader.fields:
            raise UserError(f"the file that was written lacks {key!r}; write it again")
    return types


def stored(path: Path) -> Callable[[str], Any]:
    """What a file holds of a tensor by its name, as float32 numbers."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    return lambda name: gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
