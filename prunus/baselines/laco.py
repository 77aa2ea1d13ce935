"""Floor 3: LaCo (Yang et al. 2024, arXiv:2402.11187): later layers are folded into earlier ones.

Layer l takes over the differences of the m layers behind it, W_l + sum_k (W_(l+k) - W_l) (eq. 2), and those leave, if
the last hidden states of a few short texts keep a mean cosine above a threshold with the dense model's. The released
code adds the differences one after the other to what has changed by then, which leaves W_(l+m) alone: `released`.
The paper gives each model its own threshold; here the highest one in steps of .05 is taken that reaches the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from prunus.baselines.subject import Outcome, Subject, leavers, without
from prunus.errors import UserError
from prunus.models.slicing import extract

MERGED, INTERVAL, LOWEST = 4, 2, 1  # C, I and L of the paper's tables
TEXTS, LENGTH = 5, 64  # short texts that the similarity is taken from: the heads of calibration windows
THRESHOLDS = [round(0.95 - 0.05 * k, 2) + 0.0 for k in range(40)]  # down to -1; never -0

Layers = Mapping[int, nn.Module]  # those that are left, by their numbers in the dense model
Merge = tuple[int, tuple[int, ...]]  # the layer that takes over, and those that leave


def compress(subject: Subject, keep: float, *, released: bool = False) -> Outcome:
    """Merge until as many layers have left as the budget asks; the last merge takes no more than are needed."""
    n = leavers(subject, keep)
    probe = subject.ids[:TEXTS, :LENGTH]
    dense = dict(enumerate(subject.stream.layers))
    want = states(subject, dense, probe)
    for threshold in THRESHOLDS:
        layers = collapse(subject, dense, want, probe, n, threshold, released)
        if len(layers) == len(dense) - n:
            break
    else:
        raise UserError(
            f"cannot keep {keep:g}: merging {MERGED} layers at a time ends at {len(layers)} of {len(dense)}; keep more"
        )
    sub = without(subject, sorted(set(dense) - set(layers)))
    changed = [i for i, layer in layers.items() if layer is not dense[i]]
    override = {(i, name): p.detach() for i in changed for name, p in layers[i].named_parameters()}
    note = f"threshold {threshold:g}, merged into layers {', '.join(map(str, changed)) or 'none'}"
    return Outcome(extract(subject.model, subject.family, sub, override), sub, (note,))


def collapse(
    subject: Subject, dense: Layers, want: Tensor, probe: Tensor, n: int, threshold: float, released: bool
) -> Layers:
    """One run of the paper's algorithm 1 with a threshold; ends early where n layers have left."""
    layers, history = dict(dense), tuple[Merge, ...]()
    size = min(MERGED, len(dense) - 1)
    place = len(layers) - size
    while place >= LOWEST and len(layers) > len(dense) - n:
        left = n - (len(dense) - len(layers))
        numbers = sorted(layers)
        gone = numbers[place + 1 : place + 1 + min(size - 1, left)]
        if not gone:
            place -= 1
            continue
        merge = (numbers[place], tuple(gone))
        tried = partial(folded, layers, merge, released)
        # other thresholds and shares come by the same networks, most of them by most
        alike = subject.once(("laco", released, history, merge), partial(similarity, subject, tried, want, probe))
        if alike > threshold:
            layers, history = tried(), (*history, merge)
            place -= INTERVAL
            if place >= len(layers):
                place = len(layers) - 1 - size
        else:
            place -= 1
    return layers


def folded(layers: Layers, merge: Merge, released: bool) -> dict[int, nn.Module]:
    """The layers after one more merge; those that are given stay as they are."""
    base, gone = merge
    found = {i: layer for i, layer in layers.items() if i not in gone}
    found[base] = merged(layers[base], [layers[i] for i in gone], released)
    return found


def similarity(subject: Subject, tried: Callable[[], Layers], want: Tensor, probe: Tensor) -> float:
    """Mean cosine of the last hidden states of the texts with the dense model's."""
    got = states(subject, tried(), probe)
    return float(torch.nn.functional.cosine_similarity(got, want, dim=-1).mean())


def merged(base: nn.Module, others: list[nn.Module], released: bool) -> nn.Module:
    """A copy of `base` whose matrices carry the differences of `others`; norms and biases stay its own."""
    new = copy.deepcopy(base)
    theirs = [dict(one.named_parameters()) for one in others]
    with torch.no_grad():
        for name, p in new.named_parameters():
            if p.ndim == 2:
                own = p.detach().float().clone()
                parts = [one[name].detach().float() for one in theirs]
                p.copy_(parts[-1] if released else own + sum(part - own for part in parts))
    return new


@torch.no_grad()
def states(subject: Subject, layers: Layers, probe: Tensor) -> Tensor:
    """The last hidden states of short texts (n, length), after the final norm, one row for each text."""
    stream = subject.stream
    modules = list(stream.layers)
    hidden = stream.embed(probe)
    try:
        for i in sorted(layers):
            stream.layers[i] = layers[i]
            hidden = stream.run(i, hidden)
    finally:
        for i, module in enumerate(modules):
            stream.layers[i] = module
    subject.count(probe.numel() * len(layers) / len(modules))
    return subject.model.get_submodule(subject.family.final_norm)(hidden).float().flatten(1)  # type: ignore[no-any-return]
