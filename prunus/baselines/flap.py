"""Floor 3: FLAP (An et al. 2023, arXiv:2312.11983): metric WIFV, structure AL-AM, bias compensation.

An input j of a writer has the score Var(X_j) ||W_:,j||^2 (eq. 4); that of an attention is squared, as the released code
does it. Scores are standardised within each layer, a KV group has the mean over its columns, and one threshold over all
layers, groups and neurons meets the budget, each unit counted with its parameters. What is left out is replaced by its
mean: b' = b + W_gone E[X_gone] (eq. 7), where the configuration can hold a bias. A sub-layer that leaves whole leaves
its mean to the one before it: the released code keeps the bias of a writer that has lost all its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.baselines.activity import Activity, activity
from prunus.baselines.subject import Outcome, Subject, members
from prunus.errors import UserError
from prunus.models import costs
from prunus.models.families import Family, dims, family_of
from prunus.models.slicing import Override, extract
from prunus.scoring.moments import writer_weight
from prunus.subnetwork import LayerShape, SubNetwork

# configuration keys that give the writers of a family a bias; phi, gpt_neox, opt and gpt2 have theirs always
BIASES = {"attention": "attention_bias", "mlp": "mlp_bias"}
Place = tuple[int, str]  # a sub-layer: layer, "attention" or "mlp"


def compress(subject: Subject, keep: float, *, bias: bool = True) -> Outcome:
    """One threshold for all layers; the network keeps the highest scores that the budget has room for."""
    seen = activity(subject)
    frame, held = with_biases(subject.model) if bias else (subject.model, {})
    layout = costs.layout(frame, subject.family)
    groups, neurons = scores(subject, seen)
    sub = threshold(subject, groups, neurons, subject.budget(keep), layout)
    override = compensation(subject, seen, sub, held) if bias else {}
    notes = []
    if bias and not all(held.values()):
        lacking = " and ".join(which for which, there in held.items() if not there)
        kind = subject.model.config.model_type
        notes.append(f"a {kind} configuration holds no bias for the writer of {lacking}: no compensation there")
    if bias and any(held.values()) and (lost := len(orphans(subject, sub, held))):
        notes.append(f"the mean output of {lost} sub-layers that left whole is lost: no bias before them can hold it")
    return Outcome(extract(frame, subject.family, sub, override), sub, tuple(notes))


def scores(subject: Subject, seen: Activity) -> tuple[Tensor, Tensor]:
    """Standardised scores: of KV groups (layers, groups), and of neurons (layers, neurons)."""
    found: dict[str, Tensor] = {}
    for which, path in writers(subject.family).items():
        by_layer = []
        for i, layer in enumerate(subject.stream.layers):
            score = seen.variance(which, i) * writer_weight(layer, path).double().square().sum(0)
            by_layer.append(score**2 if which == "attention" else score)
        stacked = torch.stack(by_layer)
        found[which] = (stacked - stacked.mean(1, keepdim=True)) / stacked.std(1, keepdim=True)
    n = dims(subject.model.config)["kv_heads"]
    return found["attention"].unflatten(1, (n, -1)).mean(2), found["mlp"]  # type: ignore[no-untyped-call]


def threshold(subject: Subject, groups: Tensor, neurons: Tensor, budget: int, layout: costs.Layout) -> SubNetwork:
    """The units above the lowest threshold whose network has at most `budget` parameters in its blocks."""
    order = torch.cat([groups.flatten(), neurons.flatten()]).argsort(descending=True, stable=True)
    n_groups, per_group = groups.numel(), subject.whole.layers[0].q_per_kv
    first = int(groups[0].argmax())  # stays whatever its score is

    def chosen(count: int) -> tuple[Tensor, Tensor]:
        keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        keep[order[:count]] = True
        keep[first] = True
        return keep[:n_groups].view_as(groups), keep[n_groups:].view_as(neurons)

    def cost(count: int) -> int:
        g, n = (mask.sum(1).tolist() for mask in chosen(count))
        shapes = (LayerShape(a, per_group if a else 0, b) for a, b in zip(g, n, strict=True))
        return costs.parameters(layout, SubNetwork(subject.whole.hidden, tuple(shapes)))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    if cost(low) > budget or low == 0:
        raise UserError(f"no network of FLAP has {budget:,} parameters in its blocks; keep more")
    g, n = chosen(low)
    return members(subject, [m.nonzero()[:, 0] for m in g], [m.nonzero()[:, 0] for m in n])


def with_biases(model: Any) -> tuple[nn.Module, dict[str, bool]]:
    """The model with zero biases wherever its configuration can hold them, and which writers have one then.

    A copy, unless nothing is to be added.
    """
    family, config = family_of(model.config), model.config
    layer = model.get_submodule(family.layers)[0]
    there = {which: layer.get_submodule(path).bias is not None for which, path in writers(family).items()}
    wanted = [BIASES[which] for which, has in there.items() if not has and hasattr(config, BIASES[which])]
    if not wanted:
        return model, there
    raw = {**config.to_dict(), **dict.fromkeys(wanted, True)}
    new_config = type(config).from_dict(raw)
    new_config._attn_implementation = config._attn_implementation
    small: Any = type(model)._from_config(new_config, dtype=next(model.parameters()).dtype)
    own = dict(model.state_dict())
    zeros = {name: torch.zeros_like(p) for name, p in small.named_parameters() if name not in own}
    small.load_state_dict({**own, **zeros}, strict=True)
    small.tie_weights()
    small = small.to(next(model.parameters()).device).eval()
    layer = small.get_submodule(family.layers)[0]
    return small, {which: layer.get_submodule(path).bias is not None for which, path in writers(family).items()}


def compensation(subject: Subject, seen: Activity, sub: SubNetwork, held: dict[str, bool]) -> Override:
    """Biases that take over the mean of what leaves, the old biases of sub-layers that leave whole included."""
    d, taken = dims(subject.model.config), dict[Place, Tensor]()
    per_group = d["q_per_kv"] * d["head_dim"]
    for i, kept in enumerate(sub.kept):
        layer = subject.stream.layers[i]
        for which, path in writers(subject.family).items():
            place = (i, which) if stays(sub, (i, which)) else heir(subject, sub, (i, which))
            if place is None or not held.get(place[1]):
                continue
            units = torch.tensor((kept.kv_heads if which == "attention" else kept.mlp) or (), device=subject.device)
            if which == "attention":
                units = (units[:, None] * per_group + torch.arange(per_group, device=subject.device)).flatten()
            mean = seen.mean[which][i].float().index_fill(0, units.long(), 0.0)
            weight = writer_weight(layer, path).float()
            old = layer.get_submodule(path).bias
            moved = weight @ mean + (old.detach().float() if isinstance(old, Tensor) else 0)
            taken[place] = taken[place] + moved if place in taken else moved
    return {(i, f"{writers(subject.family)[which]}.bias"): bias for (i, which), bias in taken.items()}


def heir(subject: Subject, sub: SubNetwork, gone: Place) -> Place | None:
    """The sub-layer whose bias stands for the mean output of one that leaves whole.

    The last one before it that stays: nobody reads the residual stream between the two, so that it carries the same
    constant. Where attention and MLP read the same stream, the MLP of the layer comes first, for its attention. None
    where a norm stands between a writer and the stream.
    """
    if subject.family.post_norm:
        return None
    i, which = gone
    parallel = subject.family.parallel and getattr(subject.model.config, "use_parallel_residual", True)
    before: list[Place] = [(i, "attention")] if which == "mlp" else [(i, "mlp")] if parallel else []
    before += [(j, other) for j in reversed(range(i)) for other in ("mlp", "attention")]
    return next(place for place in before if stays(sub, place))  # the attention of layer 0 always does


def orphans(subject: Subject, sub: SubNetwork, held: dict[str, bool]) -> list[Place]:
    """Sub-layers that leave whole and whose mean output no bias takes over."""
    gone = [(i, which) for i in range(len(sub.layers)) for which in held if not stays(sub, (i, which))]
    heirs = [heir(subject, sub, place) for place in gone]
    return [place for place, other in zip(gone, heirs, strict=True) if other is None or not held[other[1]]]


def stays(sub: SubNetwork, place: Place) -> bool:
    """Whether a network has anything of a sub-layer."""
    shape = sub.layers[place[0]]
    return shape.attends if place[1] == "attention" else shape.mlp > 0


def writers(family: Family) -> dict[str, str]:
    """Paths of the two writers of a layer."""
    return {"attention": family.attention_writer, "mlp": family.mlp_writer}
