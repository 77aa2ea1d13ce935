"""Floor 3: SLEB (Song et al. 2024, arXiv:2402.09025): greedily, the layer leaves without which the loss is least.

Metric 3 of the paper: the negative log-likelihood of calibration tokens when one more layer is gone from the network so
far. The paper takes 128 x 2048 tokens; here it is one window of the calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.baselines.subject import Outcome, Subject, droppable, leavers, without
from prunus.models.slicing import activate, extract
from prunus.subnetwork import SubNetwork

TOGETHER = 2048  # tokens of several candidates that go through a layer at once: larger products, faster


def compress(subject: Subject, keep: float) -> Outcome:
    """Networks of smaller shares continue the removals of larger ones."""
    gone: list[int] = []
    for _ in range(leavers(subject, keep)):
        candidates = [i for i in droppable(subject) if i not in gone]
        at = subject.once(
            ("sleb", tuple(gone)),
            lambda g=gone, c=candidates: least(subject, without(subject, g), [without(subject, [*g, i]) for i in c]),  # type: ignore[misc]
        )
        gone.append(candidates[at])
    sub = without(subject, gone)
    note = f"left in this order: {', '.join(map(str, gone)) or 'none'}"
    return Outcome(extract(subject.model, subject.family, sub), sub, (note,))


def least(subject: Subject, sub: SubNetwork, candidates: Sequence[SubNetwork]) -> int:
    """Which of some networks, each of which differs from `sub` in one layer, has the least loss on a judging window."""
    values = losses(subject, sub, candidates)
    return values.index(min(values))


@torch.no_grad()
def losses(subject: Subject, sub: SubNetwork, candidates: Sequence[SubNetwork]) -> list[float]:
    """Mean negative log-likelihood of the first judging window in networks that differ from `sub` in one layer each.

    Before that layer a network is `sub`, and behind it too, with other hidden states: there all of them run together.
    """
    stream, window, n = subject.stream, subject.judged()[:1], len(subject.stream)
    places = [_apart(sub, candidate) for candidate in candidates]
    with activate(subject.model, subject.family, sub):
        trail = [stream.embed(window)]
        for i in range(max(places)):
            trail.append(stream.run(i, trail[-1]))
    changed: list[Tensor] = []  # what leaves the layer in which a candidate differs
    for place, candidate in zip(places, candidates, strict=True):
        with activate(subject.model, subject.family, candidate):
            changed.append(stream.run(place, trail[place]))
    order = sorted(range(len(candidates)), key=lambda c: places[c])
    at_once = max(1, TOGETHER // window.numel())
    hidden = torch.empty((0, *trail[0].shape[1:]), dtype=trail[0].dtype, device=trail[0].device)
    targets = window[0, 1:].to(hidden.device)
    found = dict[int, float]()
    with (
        subject.progress(f"{len(candidates)} candidates", n) as advance,
        activate(subject.model, subject.family, sub),
    ):
        for i in range(n):
            if len(hidden):
                hidden = torch.cat([stream.run(i, part) for part in torch.split(hidden, at_once)])
            hidden = torch.cat([hidden, *(changed[c] for c in order if places[c] == i)])
            advance(1)
        for c, row in zip(order, hidden, strict=True):
            logits = stream.logits(row[None, :-1])[0].float()
            found[c] = float(torch.nn.functional.cross_entropy(logits, targets))
    subject.count(window.numel() * (max(places) + sum(n - place for place in places)) / n)
    return [found[c] for c in range(len(candidates))]


def _apart(a: SubNetwork, b: SubNetwork) -> int:
    """The one layer in which two networks differ."""
    (place,) = (i for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)) if x != y)
    return place
