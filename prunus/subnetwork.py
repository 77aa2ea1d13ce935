"""Floor 0: what a sub-network is. Pure data, no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """Widths kept in one decoder layer; a zero drops that sub-layer, so depth is width zero."""

    kv_heads: int  # key-value groups kept
    q_per_kv: int  # query heads kept in each group (at least 1 wherever kv_heads is not 0)
    mlp: int  # intermediate neurons kept

    @property
    def attends(self) -> bool:
        return self.kv_heads > 0 and self.q_per_kv > 0


@dataclass(frozen=True)
class LayerKept:
    """Which members one layer keeps, where they are not a prefix; None means the prefix.

    `q_per_kv` names slots inside a group; every kept group keeps the same slots.
    """

    kv_heads: tuple[int, ...] | None = None
    q_per_kv: tuple[int, ...] | None = None
    mlp: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SubNetwork:
    """A page of small integers: the widths of every layer, and the hidden size.

    The members kept are the first ones of the (sorted) super-network, unless `kept` names others;
    `kept` is empty or has one entry per layer.
    """

    hidden: int
    layers: tuple[LayerShape, ...]
    kept: tuple[LayerKept, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.kept and len(self.kept) != len(self.layers):
            raise ValueError(
                f"kept names the members of {len(self.kept)} layers, but the sub-network has {len(self.layers)}; "
                "give one LayerKept per layer, or none"
            )
        for i, (shape, kept) in enumerate(zip(self.layers, self.kept, strict=False)):
            for unit in ("kv_heads", "q_per_kv", "mlp"):
                members: tuple[int, ...] | None = getattr(kept, unit)
                if members is not None and len(members) != getattr(shape, unit):
                    raise ValueError(
                        f"layer {i} keeps {getattr(shape, unit)} of {unit}, but names {len(members)} members"
                    )

    @property
    def alive(self) -> tuple[int, ...]:
        """Indices of the layers that still compute something."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.attends or layer.mlp)

    @property
    def uniform(self) -> bool:
        """True if a stock config.json can describe it: the layers that are left are all whole and alike."""
        shapes = {self.layers[i] for i in self.alive}
        return len(shapes) == 1 and all(s.attends and s.mlp for s in shapes)

    def key(self) -> str:
        """A short name that differs for different sub-networks (16 hexadecimal digits)."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        raw: dict[str, Any] = {"hidden": self.hidden, "layers": [vars(layer) for layer in self.layers]}
        if self.kept:
            raw["kept"] = [vars(layer) for layer in self.kept]
        return json.dumps(raw, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SubNetwork:
        raw: dict[str, Any] = json.loads(text)
        kept = tuple(
            LayerKept(**{unit: None if m is None else tuple(m) for unit, m in layer.items()})
            for layer in raw.get("kept", ())
        )
        return cls(raw["hidden"], tuple(LayerShape(**layer) for layer in raw["layers"]), kept)
