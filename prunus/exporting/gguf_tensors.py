"""Floor 2: the tensors of a GGUF file: which they are, in which type, and their numbers from a model's weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.errors import UserError
from prunus.exporting.architectures import Architecture, Rows, Shapes, query_scale, rope_of
from prunus.models.families import size_of

QUANTS: Mapping[str, str] = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
KMIX: Mapping[str, int] = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # mixtures that llama.cpp makes: its own numbers
SUPERBLOCK = 256  # numbers of a row that K-quants scale together
BLOCK = 32  # numbers of a row that q8_0 and q4_0 scale together
STUB = 32  # width of an MLP of zeros, where one was dropped: llama.cpp discards the attention of a layer without MLP
_ALWAYS_F32 = ("position_embd", "rope_factors", "rope_freqs")
_TERM = re.compile(r"([\w.]+)(?:\[(\d)\])?")
_F16_MAX = 65504.0


@dataclass(frozen=True)
class Planned:
    """One tensor that will be written: its numbers are only made when they are."""

    name: str
    shape: tuple[int, ...]
    kind: str  # one of QUANTS
    make: Callable[[], Tensor]  # float32, on the CPU
    modules: tuple[nn.Module, ...] = ()  # whose weights it holds


def plan(model: Any, one: Architecture, shapes: Shapes, quant: str) -> list[Planned]:
    """Every tensor of a model in an architecture; raises UserError where a weight would be left behind.

    Matrices get the type asked for, but for two cases, in which llama.cpp's own quantisation departs from it too: rows
    that blocks of 32 do not divide stay in f16, and with q4_0 the embedding and the output matrix are q8_0. Vectors and
    position embeddings are f32.
    """
    out: list[Planned] = []
    seen: set[int] = set()
    base = next(iter(one.outer))
    for tensor, path in one.outer.items():
        out += _pair(tensor, (model.get_submodule(path),), one, quant, seen)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_submodule(one.outer[base]).weight
    if not tied or one.output == "required":
        out += _pair("output", (head,), one, quant, seen)
    out += _rope_factors(model.config, one, shapes)
    scale = query_scale(one, model.config, shapes)
    layers: Any = model.get_submodule(shapes.family.layers)
    for i, layer in enumerate(layers):
        for planned in _layer(layer, i, one, shapes, quant, seen):
            scaled = scale != 1.0 and planned.name == f"blk.{i}.{_scaled(one)}.weight"
            out.append(_times(planned, scale) if scaled else planned)
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in seen]
    if left:
        raise UserError(
            f"llama.cpp's architecture {one.name} has no place for {left[0]!r} ({len(left)} tensors in all), so the "
            "model cannot be exported as GGUF; run the checkpoint in transformers"
        )
    return out


def _layer(
    layer: nn.Module, i: int, one: Architecture, shapes: Shapes, quant: str, seen: set[int]
) -> Iterator[Planned]:
    shape = shapes.layers[i]
    parts: tuple[tuple[Rows, bool], ...] = ((one.attention, shape.attends), (one.mlp, shape.mlp > 0))
    for rows, kept in parts:
        if not kept and rows is one.attention and one.attention_free:
            continue
        for tensor, terms in rows.items():
            name = f"blk.{i}.{tensor}"
            if kept:
                yield from _row(layer, name, tensor, terms, one, shapes, i, quant, seen)
            else:
                yield _stub(name, terms, shapes, quant)


def _row(
    layer: nn.Module, name: str, tensor: str, terms: str, one: Architecture, shapes: Shapes, i: int, quant: str,
    seen: set[int],
) -> Iterator[Planned]:  # fmt: skip
    found = [_TERM.fullmatch(term.strip()) for term in terms.split("+")]
    paths = [(m[1], None if m[2] is None else int(m[2])) for m in found if m]
    modules = tuple(layer.get_submodule(path) for path, _ in paths)
    axes = [shapes.family.inner[path].partition(" -> ")[0::2] for path, _ in paths]
    d = shapes.sizes[i]

    def cut(numbers: list[Tensor]) -> Tensor:
        pieces = []
        for whole, (_, part), (_, axis) in zip(numbers, paths, axes, strict=True):
            piece = whole
            if part is not None:
                piece = whole.split([size_of(name, d) for name in axis.split("+")])[part]  # type: ignore[no-untyped-call]
            if axis == "qkv_by_head":  # rows are (head, q|k|v, head_dim); llama.cpp wants all queries first
                piece = piece.reshape(-1, 3, d["head_dim"], *piece.shape[1:]).transpose(0, 1).reshape(piece.shape)
            pieces.append(piece)
        stacked = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return neighbours(stacked, d["head_dim"]) if tensor in one.pairs else stacked

    yield from _pair(name, modules, one, quant, seen, cut)


def neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (heads x head_dim, ...) whose RoPE pairs are halves (i, i + head_dim/2), with pairs as neighbours."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _pair(
    name: str,
    modules: tuple[nn.Module, ...],
    one: Architecture,
    quant: str,
    seen: set[int],
    cut: Callable[[list[Tensor]], Tensor] = lambda numbers: numbers[0],
) -> Iterator[Planned]:
    """The weight of a tensor, and its bias where there is one."""
    tensor = name.rpartition(".")[2]
    first = _weight(modules[0])
    seen.update(id(m.weight) for m in modules)
    offset = one.norm_offset if first.ndim == 1 else 0.0
    weight = _lazy(lambda: cut([_weight(m) for m in modules]).float() + offset)
    size = cut([_weight(m).detach() for m in modules]).shape
    yield Planned(f"{name}.weight", tuple(size), _kind(tensor, tuple(size), quant), weight, modules)
    biases: list[Any] = [m.bias for m in modules if getattr(m, "bias", None) is not None]
    if len(biases) == len(modules) and (tensor in one.biases or first.ndim == 1):
        seen.update(id(bias) for bias in biases)
        yield Planned(f"{name}.bias", (size[0],), "f32", _lazy(lambda: cut(biases).float()))
    elif tensor in one.always_biases:
        yield Planned(f"{name}.bias", (size[0],), "f32", _lazy(lambda: torch.zeros(size[0])))


def _lazy(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def numbers() -> Tensor:
        with torch.no_grad():
            return make().detach().cpu()

    return numbers


def _weight(module: nn.Module) -> Tensor:
    """The weight of a module as (out, in)."""
    weight: Any = module.weight
    return weight.T if isinstance(module, Conv1D) else weight  # type: ignore[no-any-return]


def _stub(name: str, terms: str, shapes: Shapes, quant: str) -> Planned:
    """A tensor of a sub-layer that adds nothing: one head or `STUB` neurons of zeros, norms of ones."""
    d = {**shapes.sizes[0], "kv_heads": 1, "q_per_kv": 1, "mlp": STUB}
    rows = [shapes.family.inner[m[1]] for term in terms.split("+") if (m := _TERM.fullmatch(term.strip()))]
    if "->" not in rows[0]:
        size: tuple[int, ...] = (size_of(rows[0], d),)
        return Planned(f"{name}.weight", size, "f32", lambda: torch.ones(size))
    size = (sum(size_of(row.partition(" -> ")[2], d) for row in rows), size_of(rows[0].partition(" -> ")[0], d))
    if "[" in terms:  # a part of a fused weight
        size = (size_of("mlp" if name.rpartition(".")[2].startswith("ffn") else "q", d), size[1])
    return Planned(f"{name}.weight", size, _kind(name, size, quant), lambda: torch.zeros(size))


def _kind(tensor: str, size: tuple[int, ...], quant: str) -> str:
    if len(size) == 1 or tensor.startswith(_ALWAYS_F32):
        return "f32"
    if quant in ("q8_0", "q4_0"):
        if size[-1] % BLOCK:
            return "f16"
        if tensor in ("token_embd", "output"):
            return "q8_0"
    return quant


def _scaled(one: Architecture) -> str:
    return "attn_q_norm" if "attn_q_norm" in one.attention else "attn_q"


def _times(planned: Planned, factor: float) -> Planned:
    return Planned(planned.name, planned.shape, planned.kind, lambda: planned.make() * factor, planned.modules)


def _rope_factors(config: Any, one: Architecture, shapes: Shapes) -> list[Planned]:
    """What llama.cpp divides each frequency of RoPE by, where the rule is not one factor for all."""
    rope = rope_of(config)
    kind, half = rope.get("rope_type", "default"), (shapes.head_dim // 2,)
    if not one.rotary or kind not in ("llama3", "longrope"):
        return []
    if kind == "llama3":
        return [Planned("rope_freqs.weight", half, "f32", lambda: llama3_factors(rope, shapes.head_dim))]
    size = (int(shapes.head_dim * rope.get("partial_rotary_factor", 1.0)) // 2,)
    return [
        Planned(f"rope_factors_{which}.weight", size, "f32", lambda v=rope[f"{which}_factor"]: torch.tensor(v))  # type: ignore[misc]
        for which in ("long", "short")
    ]


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Divisors of the frequencies by Llama 3.1's rule, shape (head_dim / 2,): 1 for short waves, `factor` for long."""
    turns = float(rope["rope_theta"]) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    waves = float(rope["original_max_position_embeddings"]) * turns / (2 * torch.pi)  # that fit into the old context
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    share = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / float(rope["factor"]) + share)).float()


# ---------------------------------------------------------------------------------------------------------- numbers


def encoded(planned: Planned) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in its type, ready to be written; raises UserError for numbers that f16 cannot hold."""
    numbers = planned.make().contiguous().numpy()
    if planned.kind == "f16" and np.abs(numbers).max(initial=0.0) > _F16_MAX:
        raise UserError(f"{planned.name!r} has numbers beyond the range of float16; use --quant f32")
    return _quantise(numbers, planned.kind)


def n_bytes(planned: Planned) -> int:
    """Size of a tensor in its type."""
    n = int(np.prod(planned.shape))
    return {"f32": 4 * n, "f16": 2 * n, "q8_0": n // BLOCK * 34, "q4_0": n // BLOCK * 18}[planned.kind]


def _quantise(numbers: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    if kind in ("f32", "f16"):
        return numbers.astype(np.float32 if kind == "f32" else np.float16)
    import gguf

    out: np.ndarray[Any, Any] = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[QUANTS[kind]])
    return out


def rounded(numbers: Tensor, kind: str) -> Tensor:
    """A matrix (out, in) as a file of this type gives it back, float32."""
    stored = _quantise(numbers.float().contiguous().numpy(), kind)
    if kind in ("f32", "f16"):
        return torch.from_numpy(stored.astype(np.float32))
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[QUANTS[kind]]))


@torch.no_grad()
def round_weights(planned: list[Planned]) -> None:
    """Give the model the weights that the file holds (**in place**): what is left to differ is arithmetic."""
    done: set[int] = set()
    for one in planned:
        for module in one.modules:
            weight = _weight(module)
            if one.kind != "f32" and id(module.weight) not in done:
                done.add(id(module.weight))
                weight.copy_(rounded(weight.detach().cpu(), one.kind))


@torch.no_grad()
def take_back(planned: Planned, stored: Tensor) -> None:
    """Give the model the rows of one tensor as a file holds them (**in place**), whatever quantised them.

    stored: float32, as read from the file. Rows may be permuted, stacked or a part of a module's, and all of them
    multiplied by one factor: what the plan makes of ones, and of row numbers, says which went where.
    """
    own: list[Any] = [module.weight for module in planned.modules]
    before = [weight.data for weight in own]
    for weight in own:  # row numbers are exact in float32, not in 16 bits
        weight.data = torch.empty_like(weight.data, dtype=torch.float32)
    weights = [_weight(module) for module in planned.modules]
    starts = np.cumsum([0, *(len(weight) for weight in weights)]).tolist()
    for weight in weights:
        weight.fill_(1.0)
    factor = float(planned.make().flatten()[0])
    for weight, start in zip(weights, starts, strict=False):
        weight.copy_(torch.arange(start, start + len(weight), dtype=weight.dtype)[:, None].expand_as(weight))
    source = (planned.make()[:, 0] / factor).round().long()
    for weight, old in zip(own, before, strict=True):
        weight.data = old
    weights = [_weight(module) for module in planned.modules]
    for weight, start in zip(weights, starts, strict=False):
        here = (source >= start) & (source < start + len(weight))
        weight[source[here] - start] = (stored[here] / factor).to(weight)
