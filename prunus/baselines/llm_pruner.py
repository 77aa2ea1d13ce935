"""Floor 3: LLM-Pruner (Ma et al. 2023, arXiv:2305.11627): Taylor importance of coupled structures.

With the gradient g of the loss of the calibration text and its windows' squares F = mean g_n^2, a weight has the
importance |w g| (param_first), |w F w| (param_second, eq. 5 with the Fisher diagonal) or |w g - w F w / 2| (param_mix);
`vector` sums w g over a row before the absolute value (eq. 3). A structure has the sum over its weights. Block-wise,
heads (KV groups here) and neurons of the inner layers leave, all inner layers alike; channel-wise, hidden channels of
the whole model leave. The first eighth and the last sixteenth of the layers stay whole (layers 4 to 29 of 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunus.baselines.subject import Outcome, Subject, best, even_widths, largest, members
from prunus.errors import UserError
from prunus.models import costs
from prunus.models.families import UNCUT, dims
from prunus.models.rows import rows
from prunus.models.slicing import extract, sort
from prunus.scoring.importance import handing_over_gradients
from prunus.scoring.scores import by_unit
from prunus.subnetwork import SubNetwork

Taylor = Literal["vector", "param_first", "param_second", "param_mix"]
SQUARED = ("param_second", "param_mix")


@dataclass(frozen=True)
class Gradients:
    """Of the mean loss of some windows; by the parameter's path, in storage order, float32."""

    first: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]  # mean over windows of the squared gradient of each window


@dataclass(frozen=True)
class Worth:
    """Importance of every unit, float64."""

    hidden: Tensor  # (hidden,)
    kv_heads: Tensor  # (layers, groups)
    mlp: Tensor  # (layers, neurons)


def compress(subject: Subject, keep: float, *, taylor: Taylor = "param_first", channels: bool = False) -> Outcome:
    """Block-wise, or channel-wise where `channels` is true."""
    worth = importance(subject, taylor)
    note = f"gradients of {min(subject.gradient_windows, len(subject.ids))} calibration windows"
    if channels:
        return _cut_hidden(subject, keep, worth, note)
    n = len(subject.stream)
    inner = range(round(n / 8), n - round(n / 16))
    groups, neurons = even_widths(subject, keep, inner)
    d = dims(subject.model.config)
    kept_groups = [best(s, groups if i in inner else d["kv_heads"]) for i, s in enumerate(worth.kv_heads)]
    kept_neurons = [best(s, neurons if i in inner else d["mlp"]) for i, s in enumerate(worth.mlp)]
    sub = members(subject, kept_groups, kept_neurons)
    return Outcome(
        extract(subject.model, subject.family, sub), sub, (note, f"layers {inner[0]} to {inner[-1]} are cut")
    )


def _cut_hidden(subject: Subject, keep: float, worth: Worth, note: str) -> Outcome:
    whole = subject.whole

    def fits(hidden: int) -> bool:
        return costs.parameters(subject.layout, SubNetwork(hidden, whole.layers)) <= subject.budget(keep)

    hidden = largest(fits, whole.hidden)
    if hidden is None:
        raise UserError(f"cannot keep {keep:g}: not one hidden channel would be left; keep more")
    model = subject.copy()
    sort(model, subject.family, {"hidden": worth.hidden.argsort(descending=True, stable=True)})
    sub = SubNetwork(hidden, whole.layers)
    return Outcome(extract(model, subject.family, sub), sub, (note,))


def importance(subject: Subject, taylor: Taylor) -> Worth:
    """Importance of every unit from the subject's gradients."""
    found = subject.once("gradients", lambda: gradients(subject))
    d, n = dims(subject.model.config), len(subject.stream)
    totals = {
        "hidden": torch.zeros(d["hidden"], dtype=torch.float64, device=subject.device),
        "kv_heads": torch.zeros(n, d["kv_heads"], dtype=torch.float64, device=subject.device),
        "mlp": torch.zeros(n, d["mlp"], dtype=torch.float64, device=subject.device),
    }
    seen = set()
    for row in rows(subject.model, subject.family):
        if UNCUT in row.axes or id(row.parameter) in seen:
            continue
        seen.add(id(row.parameter))
        each = salience(row.parameter.detach(), found.first[row.path], found.squares[row.path], taylor)
        for dim, axis in enumerate(row.axes):
            others = [k for k in range(each.ndim) if k != dim]
            if taylor == "vector":
                values = (each.sum(others) if others else each).abs()
            else:
                values = each.abs().sum(others) if others else each.abs()
            for unit, value in by_unit(values.double(), axis, d).items():
                if unit == "hidden":
                    totals["hidden"] += value
                elif unit in totals and row.layer is not None:
                    totals[unit][row.layer] += value
    return Worth(**totals)


def salience(weight: Tensor, grad: Tensor, squares: Tensor, taylor: Taylor) -> Tensor:
    """Signed importance of every weight, in its own shape, float32."""
    w = weight.float()
    if taylor == "param_second":
        return w * squares * w
    return w * grad - (0.5 * w * squares * w if taylor == "param_mix" else 0)


def gradients(subject: Subject) -> Gradients:
    """One backward for each of the first `gradient_windows` calibration windows; the model is left as it is."""
    model, ids = subject.model, subject.ids[: subject.gradient_windows]
    paths = {id(row.parameter): row.path for row in rows(model, subject.family)}
    first: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def use(parameter: Tensor, grad: Tensor) -> None:
        path = paths[id(parameter)]
        g = grad.float() / len(ids)
        first[path] = first[path].add_(g) if path in first else g
        g2 = grad.float().square_() / len(ids)
        squares[path] = squares[path].add_(g2) if path in squares else g2

    with handing_over_gradients(model, paths, use), subject.progress("gradients", ids.numel()) as advance:
        for window in ids.split(1):  # type: ignore[no-untyped-call]
            with torch.enable_grad():
                model(input_ids=window, labels=window, use_cache=False).loss.backward()
            advance(window.numel())
    subject.count(3 * ids.numel())
    names = {row.path: paths[id(row.parameter)] for row in rows(model, subject.family)}  # tied ones under one path
    return Gradients({k: first[v] for k, v in names.items()}, {k: squares[v] for k, v in names.items()})
