"""Floor 1: what a sub-network costs, from shapes alone: parameters, bytes, FLOPs, memory. Needs no weights.

Every count is a polynomial of four widths (hidden, KV groups, query heads per group, neurons) whose coefficients come
from the family table once; a candidate of 30 layers then costs some microseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from prunus.models.families import AXES, UNCUT, Family, Part, dims, is_dropped
from prunus.models.rows import layers_of, rows
from prunus.subnetwork import LayerShape, SubNetwork

Of = Literal["blocks", "all"]
SEARCHED = ("hidden", "kv_heads", "q_per_kv", "mlp")
Term = tuple[int, int, int, int, int]  # coefficient, then the powers of SEARCHED
Polynomial = tuple[Term, ...]


@dataclass(frozen=True)
class Entry:
    """One parameter of the super-network, as data."""

    path: str  # as in state_dict of the model without adapters
    axes: tuple[str, ...]  # in storage order
    layer: int | None
    part: Part
    ties: str | None = None  # path of the first entry that shares this parameter; it is counted there


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything about a super-network that its costs depend on; built by `layout`, needs no weights afterwards."""

    entries: tuple[Entry, ...]
    whole: Mapping[str, int]  # the dimensions of the super-network
    n_layers: int
    sizes: Mapping[tuple[int | None, Part], Polynomial]  # parameters of one part of one layer (None: outside)
    matrices: Mapping[tuple[int | None, Part], Polynomial]  # the same, only weights that every token is multiplied by
    windows: tuple[int | None, ...] = ()  # tokens that the attention of each layer looks back on; None: all


def layout(model: nn.Module, family: Family) -> Layout:
    """The layout of a super-network, which may live on the meta device and carry LoRA adapters (not counted)."""
    whole = dims(model.config)
    entries = tuple(_entries(model, family))
    looked_up = {f"{path}.weight" for path, row in family.outer.items() if row.startswith(("vocab ->", "positions ->"))}
    multiplied = (e for e in entries if len(e.axes) == 2 and e.path not in looked_up)
    return Layout(
        entries=entries,
        whole=MappingProxyType(whole),
        n_layers=len(layers_of(model, family)),
        sizes=_by_part((e for e in entries if e.ties is None), whole),
        matrices=_by_part(multiplied, whole),
        windows=tuple(_windows(model.config, len(layers_of(model, family)))),
    )


def _windows(config: Any, n_layers: int) -> Iterator[int | None]:
    """As transformers' caches read a configuration: without a list of kinds, a window holds for all layers."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * n_layers
    for kind in kinds:
        yield int(window) if window and kind == "sliding_attention" else None


def _entries(model: nn.Module, family: Family) -> Iterator[Entry]:
    first: dict[int, str] = {}
    for row in rows(model, family):
        if UNCUT in row.axes:  # an adapter's
            continue
        path = row.path.replace(".base_layer.", ".")
        ties = first.setdefault(id(row.parameter), path)
        yield Entry(path, row.axes, row.layer, row.part, None if ties == path else ties)


def _by_part(entries: Iterable[Entry], whole: Mapping[str, int]) -> Mapping[tuple[int | None, Part], Polynomial]:
    sums: dict[tuple[int | None, Part], Counter[tuple[int, ...]]] = {}
    for entry in entries:
        product: Counter[tuple[int, ...]] = Counter({(0, 0, 0, 0): 1})
        for axis in entry.axes:
            product = _times(product, _axis_polynomial(axis, whole))
        sums.setdefault((entry.layer, entry.part), Counter()).update(product)
    return MappingProxyType(
        {key: tuple((n, *powers) for powers, n in sorted(terms.items())) for key, terms in sums.items()}  # type: ignore[misc]
    )


def _axis_polynomial(axis: str, whole: Mapping[str, int]) -> Counter[tuple[int, ...]]:
    total: Counter[tuple[int, ...]] = Counter()
    for part in axis.split("+"):
        coefficient, powers = 1, [0] * len(SEARCHED)
        for dimension in AXES[part]:
            if dimension in SEARCHED:
                powers[SEARCHED.index(dimension)] += 1
            else:
                coefficient *= whole[dimension]
        total[tuple(powers)] += coefficient
    return total


def _times(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> Counter[tuple[int, ...]]:
    product: Counter[tuple[int, ...]] = Counter()
    for left, m in a.items():
        for right, n in b.items():
            product[tuple(p + q for p, q in zip(left, right, strict=True))] += m * n
    return product


def _value(polynomial: Polynomial, hidden: int, kv_heads: int, q_per_kv: int, mlp: int) -> int:
    return sum(n * hidden**h * kv_heads**k * q_per_kv**q * mlp**m for n, h, k, q, m in polynomial)


def _sum(layout: Layout, table: Mapping[tuple[int | None, Part], Polynomial], sub: SubNetwork, outer: bool) -> int:
    if len(sub.layers) != layout.n_layers:
        raise ValueError(f"the sub-network has {len(sub.layers)} layers, the layout has {layout.n_layers}")
    total = _value(table.get((None, "outer"), ()), sub.hidden, 0, 0, 0) if outer else 0
    for i, shape in enumerate(sub.layers):
        total += sum(_part_value(table, i, part, shape, sub.hidden) for part in ("attention", "mlp", "block"))
    return total


def _part_value(
    table: Mapping[tuple[int | None, Part], Polynomial], layer: int, part: Part, shape: LayerShape, hidden: int
) -> int:
    if is_dropped(part, shape):
        return 0
    return _value(table.get((layer, part), ()), hidden, shape.kv_heads, shape.q_per_kv, shape.mlp)


def parameters(layout: Layout, sub: SubNetwork, of: Of = "blocks") -> int:
    """Number of parameters of the extracted model, tied ones once; the norms of dropped sub-layers are gone too.

    of: "blocks" counts everything inside the decoder layers; "all" adds embeddings, final norm and output matrix.
    """
    return _sum(layout, layout.sizes, sub, outer=of == "all")


def sublayer_parameters(layout: Layout, layer: int, part: Part, shape: LayerShape, hidden: int) -> int:
    """Parameters of one sub-layer ("attention" or "mlp", norms included) of the given shape; 0 where it is dropped.

    The blocks are the sum over layers of both, plus the part "block" where a family's sub-layers share a norm
    (parallel ones, e.g. phi), which stays until both are dropped.
    """
    return _part_value(layout.sizes, layer, part, shape, hidden)


def n_bytes(layout: Layout, sub: SubNetwork, bytes_per_parameter: float = 2.0, of: Of = "all") -> int:
    """Bytes of the extracted model's weights at rest (bf16 and fp16: 2 per parameter, fp32: 4)."""
    return round(parameters(layout, sub, of) * bytes_per_parameter)


def flops(layout: Layout, sub: SubNetwork, length: int, batch: int = 1, of: Of = "all") -> int:
    """Floating-point operations of one prefill (two for every multiply-add), logits at every position.

    Counts the matrices and both products of the attention over the whole (length, length) square, as dense kernels
    compute it; norms, activations and softmax (under 1 %) are left out, and so are savings by sliding windows.
    """
    tokens = length * batch
    weights = _sum(layout, layout.matrices, sub, outer=of == "all")
    heads = sum(s.kv_heads * s.q_per_kv for s in sub.layers if s.attends)
    return 2 * tokens * weights + 4 * tokens * length * heads * layout.whole["head_dim"]


def decode_bytes(
    layout: Layout, sub: SubNetwork, context: int, batch: int = 1, bytes_per_parameter: float = 2.0
) -> int:
    """Bytes moved to generate one token for each of `batch` sequences: all matrices once, and the KV cache.

    The token embedding is a look-up of one row, so it counts only where it also is the output matrix.
    """
    weights = _sum(layout, layout.matrices, sub, outer=True)
    return round(weights * bytes_per_parameter) + cache_bytes(layout, sub, context, batch, bytes_per_parameter)


def cache_bytes(layout: Layout, sub: SubNetwork, context: int, batch: int = 1, bytes_per_parameter: float = 2.0) -> int:
    """Bytes of the keys and values of `batch` sequences of `context` tokens; sliding windows keep only theirs."""
    windows = layout.windows or (None,) * layout.n_layers
    tokens = sum(
        s.kv_heads * min(context, window or context) for s, window in zip(sub.layers, windows, strict=True) if s.attends
    )
    return round(2 * tokens * layout.whole["head_dim"] * batch * bytes_per_parameter)


def memory_bytes(
    layout: Layout, sub: SubNetwork, context: int, batch: int = 1, bytes_per_parameter: float = 2.0
) -> int:
    """Bytes that serving takes at least: weights and a full KV cache, without activations and the runtime itself."""
    return n_bytes(layout, sub, bytes_per_parameter) + cache_bytes(layout, sub, context, batch, bytes_per_parameter)
