"""Floor 2: the only file that touches the shape of a weight: sort, activate, extract.

Importance is used once, to permute the super-network in place; from then on a sub-network is only *how many* to
keep, a prefix along each dimension. `activate` and `extract` run through the same `take`, so they agree exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.errors import UserError
from prunus.models.checkpoint import blank
from prunus.models.families import AXES, UNCUT, Family, Part, dims, full, is_dropped, size_of
from prunus.models.ragged import NoAttention, NoMLP
from prunus.models.rows import Row, check, layers_of, rows
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

Kept = Mapping[str, int | Tensor]  # dimension -> how many (a prefix), or which (indices)
Override = Mapping[tuple[int, str], Tensor]  # (layer, parameter path in it) -> tensor, as stored


def check_subnetwork(config: Any, sub: SubNetwork) -> None:
    """The sub-network fits inside the super-network; raises UserError with the limit that it breaks."""
    d = dims(config)
    if len(sub.layers) != config.num_hidden_layers:
        raise UserError(f"the sub-network has {len(sub.layers)} layers, the model has {config.num_hidden_layers}")
    if not 1 <= sub.hidden <= d["hidden"]:
        raise UserError(f"hidden size {sub.hidden} is outside 1..{d['hidden']}")
    for i, layer in enumerate(sub.layers):
        for unit in ("kv_heads", "q_per_kv", "mlp"):
            if not 0 <= getattr(layer, unit) <= d[unit]:
                raise UserError(f"layer {i}: {unit} {getattr(layer, unit)} is outside 0..{d[unit]}")
        for unit in ("kv_heads", "q_per_kv", "mlp"):
            named = getattr(sub.kept[i], unit) if sub.kept else None
            if named is not None and (len(set(named)) < len(named) or not set(named) <= set(range(d[unit]))):
                raise UserError(f"layer {i}: {unit} names a member twice, or one outside 0..{d[unit] - 1}")
    if not sub.layers[0].attends:
        raise UserError(
            "the attention of layer 0 is never dropped: static caches and llama.cpp take their sizes from it; "
            "keep at least one KV group there"
        )


# ------------------------------------------------------------------------------------------------ taking slices


def _cut_part(t: Tensor, dim: int, part: str, whole: Mapping[str, int], kept: Kept) -> Tensor:
    """Keep the members of one product axis; a view where the memory layout allows it."""
    factors = AXES[part]
    cut = [k for k, f in enumerate(factors) if not _is_whole(kept[f], whole[f])]
    if not cut:
        return t
    if cut == [0]:  # only the outermost dimension: one narrow, or one row gather
        inner = t.shape[dim] // whole[factors[0]]
        which = kept[factors[0]]
        if isinstance(which, int):
            return t.narrow(dim, 0, which * inner)
    t = _unflatten(t, dim, [whole[f] for f in factors])
    for k in cut:
        which = kept[factors[k]]
        if isinstance(which, int):
            t = t.narrow(dim + k, 0, which)
        else:
            t = t.index_select(dim + k, which.to(t.device))
    return t.flatten(dim, dim + len(factors) - 1)


def _unflatten(t: Tensor, dim: int, sizes: list[int]) -> Tensor:
    return t.view(*t.shape[:dim], *sizes, *t.shape[dim + 1 :])


def _is_whole(which: int | Tensor, n: int) -> bool:
    return isinstance(which, int) and which == n


def take(t: Tensor, axes: tuple[str, ...], whole: Mapping[str, int], kept: Kept) -> Tensor:
    """The part of a weight that a sub-network keeps.

    A view if every cut dimension is the outermost of its axis (hidden, neurons, KV groups); query heads inside
    their groups and fused weights need a copy of that weight, because Hugging Face's layout is group-major.
    """
    # views first, so that what has to be copied is small by then
    for dim, axis in sorted(enumerate(axes), key=lambda at: len(AXES.get(at[1], at[1]))):
        if axis == UNCUT:
            continue
        parts = axis.split("+")
        if len(parts) == 1:
            t = _cut_part(t, dim, axis, whole, kept)
            continue
        if all(_is_whole(kept[f], whole[f]) for part in parts for f in AXES[part]):
            continue
        pieces, start = [], 0
        for part in parts:
            n = size_of(part, whole)
            pieces.append(_cut_part(t.narrow(dim, start, n), dim, part, whole, kept))
            start += n
        t = torch.cat(pieces, dim)
    return t


def kept_dims(whole: Mapping[str, int], hidden: int, shape: LayerShape | None, members: LayerKept | None) -> Kept:
    """What one layer of a sub-network keeps of every dimension (`shape` None: outside the layers)."""
    kept: dict[str, int | Tensor] = {**whole, "hidden": hidden}
    if shape is not None:
        for unit in ("kv_heads", "q_per_kv", "mlp"):
            named = getattr(members, unit) if members is not None else None
            kept[unit] = getattr(shape, unit) if named is None else torch.tensor(named, dtype=torch.long)
    return kept


def _all_kept(model: nn.Module, sub: SubNetwork) -> tuple[dict[str, int], Kept, list[Kept]]:
    whole = dims(model.config)
    members: tuple[LayerKept | None, ...] = sub.kept or (None,) * len(sub.layers)
    inner = [kept_dims(whole, sub.hidden, s, m) for s, m in zip(sub.layers, members, strict=True)]
    return whole, kept_dims(whole, sub.hidden, None, None), inner


# ------------------------------------------------------------------------------------------------------- sorting


def sort(model: nn.Module, family: Family, order: Mapping[str, Tensor | list[Tensor]]) -> None:
    """Permute the super-network **in place**, most important members first; its function does not change.

    order: "hidden" (hidden,), "kv_heads" (layers, groups), "q_per_kv" (layers, groups, heads per group: a permutation
    inside each *original* group), "mlp" (layers, neurons). Any may be missing. Sukthanker et al. 2024, sec. 4.2.
    """
    _check_whole(model)
    _check_order(order)
    whole, done = dims(model.config), set()
    with torch.no_grad():
        for row in rows(model, family):
            if id(row.parameter) in done:
                continue
            done.add(id(row.parameter))
            t = row.parameter.data
            for dim, axis in enumerate(row.axes):
                if axis == UNCUT:
                    continue
                index = _axis_order(axis, whole, order, row.layer)
                if index is not None:
                    t = t.index_select(dim, index.to(t.device))
            row.parameter.data = t.contiguous()


def _check_order(order: Mapping[str, Tensor | list[Tensor]]) -> None:
    for unit, new in order.items():
        if unit not in ("hidden", "kv_heads", "q_per_kv", "mlp"):
            raise ValueError(f"an order names hidden, kv_heads, q_per_kv or mlp, not {unit!r}")
        for one in [new] if isinstance(new, Tensor) else new:
            if not torch.equal(one.sort(dim=-1).values.cpu(), torch.arange(one.shape[-1]).expand(one.shape)):
                raise ValueError(f"the order of {unit} is no permutation: a member is missing or named twice")


def _axis_order(
    axis: str, whole: Mapping[str, int], order: Mapping[str, Tensor | list[Tensor]], layer: int | None
) -> Tensor | None:
    """Row numbers along one axis in the new order, or None if nothing moves."""
    pieces, start, moved = [], 0, False
    for part in axis.split("+"):
        factors, n = AXES[part], size_of(part, whole)
        index = torch.arange(n).view([whole[f] for f in factors])
        for k, f in enumerate(factors):
            if f not in order or (f != "hidden" and layer is None):
                continue
            moved = True
            named = order[f] if f == "hidden" else order[f][layer]  # type: ignore[index]
            assert isinstance(named, Tensor)
            new = named.cpu()
            if f == "kv_heads" and "q_per_kv" in factors and "q_per_kv" in order:
                # heads first, inside the groups as they were named; then the groups move with their heads
                heads = order["q_per_kv"][layer].cpu()  # type: ignore[index]
                index = torch.stack([g.index_select(0, h) for g, h in zip(index, heads, strict=True)])
            if f == "q_per_kv":
                if "kv_heads" in order:
                    continue
                index = torch.stack([g.index_select(0, h) for g, h in zip(index, new, strict=True)])
                continue
            index = index.index_select(k, new)
        pieces.append(index.flatten() + start)
        start += n
    return torch.cat(pieces) if moved else None


# ---------------------------------------------------------------------------------------------------- activation


def drop(layer: nn.Module, family: Family, attention: bool, mlp: bool) -> None:
    """Replace the named sub-layers of one decoder layer by modules that add nothing (**in place**)."""
    if attention:
        number: Any = layer.get_submodule(family.attention_module).layer_idx
        layer.set_submodule(family.attention_module, NoAttention(number))
    if mlp:
        for path in family.mlp_modules[:-1]:
            layer.set_submodule(path, nn.Identity())
        layer.set_submodule(family.mlp_modules[-1], NoMLP())


@dataclass
class _Active:
    """What a model computes as at the moment, and how to undo it."""

    family: Family
    sub: SubNetwork
    override: Override
    grad: bool
    undo: list[Callable[[], Any]]

    def enter(self, model: nn.Module) -> None:
        try:  # the modes of the block itself: returning to it may happen inside an inner block of other modes
            with torch.inference_mode(False), torch.set_grad_enabled(self.grad):
                _activate(model, self)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        while self.undo:
            self.undo.pop()()


_ACTIVE: WeakKeyDictionary[nn.Module, _Active] = WeakKeyDictionary()


@contextmanager
def activate(
    model: nn.Module, family: Family, sub: SubNetwork, override: Override | None = None
) -> Iterator[nn.Module]:
    """Inside the block `model` computes as the sub-network; leaving it restores the model, also after an exception.

    Weights become views of the super-network's (see `take`), so gradients reach the super-network when grad mode is
    on. Call `backward` inside the block if gradient checkpointing re-runs the forward. A block inside another one
    activates its own sub-network of the whole super-network, and leaving it returns to the outer one's.
    override: tensors that replace the slice of a parameter, e.g. reformed weights.
    """
    check_subnetwork(model.config, sub)
    outer = _ACTIVE.get(model)
    active = _Active(family, sub, override or {}, torch.is_grad_enabled(), [])
    if outer is not None:
        outer.leave()
    try:
        active.enter(model)
        _ACTIVE[model] = active
        yield model
    finally:
        active.leave()
        if outer is None:
            _ACTIVE.pop(model, None)
        else:
            _ACTIVE[model] = outer
            outer.enter(model)


def _check_whole(model: nn.Module) -> None:
    if model in _ACTIVE:
        raise RuntimeError("a sub-network is active: leave `activate` before sorting or extracting the super-network")


def _activate(model: nn.Module, active: _Active) -> None:
    family, sub, override, grad, undo = active.family, active.sub, active.override, active.grad, active.undo
    whole, outer, inner = _all_kept(model, sub)
    layers = layers_of(model, family)
    same_hidden = sub.hidden == whole["hidden"] and not sub.kept
    unchanged = {i for i, shape in enumerate(sub.layers) if same_hidden and shape == _whole_layer(whole)}
    unchanged -= {i for i, _ in override}
    for row in list(rows(model, family)):
        i = row.layer
        shape = None if i is None else sub.layers[i]
        if is_dropped(row.part, shape) and _stands_in(family, row):
            continue
        if i in unchanged:
            continue
        view = None
        if i is not None:
            view = override.get((i, row.path.removeprefix(f"{family.layers}.{i}.").replace(".base_layer.", ".")))
        if view is None:
            source = row.parameter if grad else row.parameter.data
            view = take(source, row.axes, whole, outer if i is None else inner[i])
            if view is source:
                continue
        _swap(row, view, grad, undo)
    for i, shape in enumerate(sub.layers):
        _fit_layer(layers[i], family, whole, sub.hidden, shape, undo)
    if sub.hidden != whole["hidden"]:
        _fit_roots(model, family, {**whole, "hidden": sub.hidden}, undo)


def _stands_in(family: Family, row: Row) -> bool:
    """True if the row's module is replaced where its sub-layer is dropped (a norm beside it still runs)."""
    inside = row.path.removeprefix(f"{family.layers}.{row.layer}.")
    return any(inside.startswith(f"{path}.") for path in (family.attention_module, *family.mlp_modules))


def _whole_layer(whole: Mapping[str, int]) -> LayerShape:
    return LayerShape(whole["kv_heads"], whole["q_per_kv"], whole["mlp"])


def _swap(row: Row, view: Tensor, grad: bool, undo: list[Callable[[], Any]]) -> None:
    module, name, parameter = row.module, row.name, row.parameter
    # autograd needs the view itself, which is no Parameter; it stands in the parameters' dict all the same (as in
    # torch.func.functional_call), because generate() and lm-eval ask a model's parameters for their device
    held = cast(dict[str, Tensor], module._parameters)
    held[name] = view if grad else nn.Parameter(view, requires_grad=False)
    undo.append(lambda: held.__setitem__(name, parameter))
    if name == "weight":  # attributes that torch and transformers keep beside the weight
        if isinstance(module, nn.LayerNorm):
            _set(module, "normalized_shape", tuple(view.shape), undo)
        elif isinstance(module, Conv1D):
            _set(module, "nf", view.shape[1], undo)


def _set(owner: Any, name: str, value: Any, undo: list[Callable[[], Any]]) -> None:
    old = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, value)


def _fit_layer(
    layer: nn.Module,
    family: Family,
    whole: Mapping[str, int],
    hidden: int,
    shape: LayerShape,
    undo: list[Callable[[], Any]],
) -> None:
    """Set the attributes that a layer's forward reads, and stand-ins for dropped sub-layers."""
    size = {**whole, "hidden": hidden, "kv_heads": shape.kv_heads, "q_per_kv": shape.q_per_kv, "mlp": shape.mlp}
    if shape.attends:
        for path, axis in family.sizes.items():
            owner, _, name = path.rpartition(".")
            _set(layer.get_submodule(owner), name, size_of(axis, size), undo)
        if family.config_sizes:
            attention = layer.get_submodule(family.attention_module)
            config = copy.copy(attention.config)
            for key, axis in family.config_sizes.items():
                setattr(config, key, size_of(axis, size))
            _set(attention, "config", config, undo)
    gone = ([] if shape.attends else [family.attention_module]) + ([] if shape.mlp else list(family.mlp_modules))
    for path in gone:
        old = layer.get_submodule(path)
        undo.append(lambda path=path, old=old: layer.set_submodule(path, old))  # type: ignore[misc]
    drop(layer, family, attention=not shape.attends, mlp=not shape.mlp)


def _fit_roots(model: nn.Module, family: Family, size: Mapping[str, int], undo: list[Callable[[], Any]]) -> None:
    """Constants that are square roots of a dimension take the value a stock model of the new size computes."""
    for path, axis in family.roots.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        module = getattr(module, "base_layer", module)  # below a LoRA adapter
        old = getattr(module, name)
        _set(module, name, torch.full_like(old, size_of(axis, size) ** 0.5), undo)


# ---------------------------------------------------------------------------------------------------- extraction


def state_of(model: nn.Module, family: Family, sub: SubNetwork, override: Override | None = None) -> dict[str, Tensor]:
    """The sub-network's own state_dict, cloned: layers that do nothing are left out and the rest renumbered."""
    check_subnetwork(model.config, sub)
    _check_whole(model)
    whole, outer, inner = _all_kept(model, sub)
    number = {old: new for new, old in enumerate(sub.alive)}
    override = override or {}
    state: dict[str, Tensor] = {}
    for row in rows(model, family):
        i = row.layer
        if i is None:
            state[row.path] = take(row.parameter.data, row.axes, whole, outer).clone()
            continue
        if i not in number or is_dropped(row.part, sub.layers[i]):
            continue
        inside = row.path.removeprefix(f"{family.layers}.{i}.")
        new = override.get((i, inside))
        if new is None:
            new = take(row.parameter.data, row.axes, whole, inner[i])
        state[f"{family.layers}.{number[i]}.{inside}"] = new.to(row.parameter.dtype).clone().contiguous()
    return state


def extract(
    model: nn.Module, family: Family, sub: SubNetwork, override: Override | None = None, uniform: bool | None = None
) -> nn.Module:
    """A new, ordinary Hugging Face model that holds the sub-network's weights.

    A uniform sub-network gives a stock class; any other the self-contained ragged class of `prunus.models.ragged`.
    uniform: True refuses with UserError what the stock configuration cannot express; None chooses.
    """
    small = blank(model.config, family, sub, uniform=uniform, dtype=next(model.parameters()).dtype)
    missing, unexpected = small.load_state_dict(state_of(model, family, sub, override), strict=False, assign=True)
    tied = set(getattr(small, "all_tied_weights_keys", None) or getattr(small, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    assert not missing and not unexpected, (missing, unexpected)
    small.tie_weights()  # type: ignore[operator]
    small.to(next(model.parameters()).device)
    return small.eval()


__all__ = [
    "NoAttention",
    "NoMLP",
    "Override",
    "Part",
    "Row",
    "activate",
    "check",
    "check_subnetwork",
    "extract",
    "full",
    "is_dropped",
    "kept_dims",
    "layers_of",
    "rows",
    "sort",
    "state_of",
    "take",
]
