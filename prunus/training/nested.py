"""Floor 3: sub-networks that are reformed while they are trained: one super-network whose every prefix is reformed.

Reformation is linear in the weight: W_K' = W_K + W_P T, where T = G_PK (G_KK + R)^-1 depends on the inputs alone (see
`reform.closed_form`). So a sub-network can run with the weights that it would be shipped with and still be a function
of the one super-network, whose omitted columns then learn too, through T. Neither paper has this: Sukthanker et al.
2024 (arXiv:2410.06479) train plain prefixes, Shen et al. 2024 (arXiv:2409.17372) reform without training.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.models.families import Family, dims
from prunus.models.rows import Row, layers_of, rows
from prunus.models.slicing import Override
from prunus.reforming.levels import Levels
from prunus.reforming.reform import carried, omitted
from prunus.subnetwork import LayerShape, SubNetwork

Part = Literal["attention", "mlp"]
CACHE = 2 << 30  # bytes that the matrices T may take; those that were not used for longest are computed again


@dataclass(frozen=True)
class Level:
    """What one writer needs for one number of inputs."""

    kept: Tensor  # (k,), indices
    gone: Tensor  # (n - k,)
    carried: Tensor  # (n - k, k): T
    mean: Tensor  # (n - k,): what the omitted inputs are on average beyond what the kept ones stand in for

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for t in (self.kept, self.gone, self.carried, self.mean))


class Nested:
    """`Nested(...)(sub)` are the reformed writers of a sub-network as `activate` takes them, with gradients.

    database: the levels of the sorted model before training; its Grams stay as they are while weights learn.
    Adapters of LoRA are carried over like the weights that they adapt, and biases take over the mean of what went.
    """

    def __init__(self, model: Any, family: Family, database: Levels, cache_bytes: int = CACHE) -> None:
        self.database, self.room, self.hidden = database, cache_bytes, dims(model.config)["hidden"]
        self.layers = layers_of(model, family)
        self.paths: dict[Part, str] = {"attention": family.attention_writer, "mlp": family.mlp_writer}
        self.rows: dict[tuple[int, Part], list[tuple[str, Row]]] = {}
        for row in rows(model, family):
            for part, path in self.paths.items():
                inside = row.path.removeprefix(f"{family.layers}.{row.layer}.").replace(".base_layer.", ".")
                if row.layer is not None and inside.startswith(f"{path}.") and "lora_B" not in inside:
                    self.rows.setdefault((row.layer, part), []).append((inside, row))
        self._cache: OrderedDict[tuple[object, ...], Level] = OrderedDict()

    def __call__(self, sub: SubNetwork) -> Override:
        found: dict[tuple[int, str], Tensor] = {}
        if sub.hidden != self.hidden or sub.kept or self.database.method == "none":
            return found
        whole = self.database.whole
        for i, shape in enumerate(sub.layers):
            if shape.attends and (shape.kv_heads, shape.q_per_kv) != (whole.kv_heads, whole.q_per_kv):
                found |= self._writer(i, "attention", self.level(i, "attention", shape))
            if shape.mlp and shape.mlp != whole.mlp:
                found |= self._writer(i, "mlp", self.level(i, "mlp", shape))
        return found

    @torch.no_grad()
    def level(self, i: int, part: Part, shape: LayerShape) -> Level:
        """What carries the omitted inputs of one writer over to those that a shape keeps, on the model's device."""
        key = (i, part, shape.mlp if part == "mlp" else (shape.kv_heads, shape.q_per_kv))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        grams = self.database.grams(i)
        gram, mean = getattr(grams, part), getattr(grams, f"{part}_mean")
        kept = self.database.inputs(part, shape).to(gram.device)
        gone, over = omitted(kept, len(gram)), carried(gram, kept, self.database.damping)
        level = Level(kept, gone, over.contiguous(), mean[gone] - over @ mean[kept])
        self._cache[key] = level
        self.room -= level.n_bytes
        while self.room < 0 and len(self._cache) > 1:
            self.room += self._cache.popitem(last=False)[1].n_bytes
        return level

    def _writer(self, i: int, part: Part, level: Level) -> Override:
        """Every parameter of a writer that its inputs matter to; autograd goes through it where grad mode is on."""
        found: dict[tuple[int, str], Tensor] = {}
        module: Any = self.layers[i].get_submodule(self.paths[part])
        for inside, row in self.rows[i, part]:
            own = row.parameter if torch.is_grad_enabled() else row.parameter.detach()
            if inside == f"{self.paths[part]}.bias":
                base = getattr(module, "base_layer", module).weight
                weight = base if isinstance(getattr(module, "base_layer", module), nn.Linear) else base.T
                moved = weight[:, level.gone].float() @ level.mean
                for name in getattr(module, "active_adapters", ()):
                    down = module.lora_A[name].weight[:, level.gone] @ level.mean
                    moved = moved + module.scaling[name] * (module.lora_B[name].weight @ down)
                found[i, inside] = (own.float() + moved).to(own.dtype)
                continue
            wide = own if isinstance(row.module, nn.Linear) else own.T  # (out, in)
            new = wide[:, level.kept].float() + wide[:, level.gone].float() @ level.carried
            found[i, inside] = (new if isinstance(row.module, nn.Linear) else new.T).to(own.dtype)
        return found


__all__ = ["Level", "Nested"]
