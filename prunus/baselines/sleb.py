"""Floor 3: SLEB (Song et al. 2024, arXiv:2402.09025): greedily, the layer leaves without which the loss is least.

Metric 3 of the paper: the negative log-likelihood of calibration tokens when one more layer is gone from the network so
far. The paper takes 128 x 2048 tokens; here it is one window of the calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence

from prunus.baselines.subject import Outcome, Subject, droppable, leavers, without
from prunus.models.slicing import extract
from prunus.searching.objective import Divergence
from prunus.subnetwork import SubNetwork


def compress(subject: Subject, keep: float) -> Outcome:
    """Networks of smaller shares continue the removals of larger ones."""
    gone: list[int] = []
    for _ in range(leavers(subject, keep)):
        candidates = [i for i in droppable(subject) if i not in gone]
        subs = [without(subject, [*gone, i]) for i in candidates]
        at = subject.once(("sleb", tuple(gone)), lambda s=subs: least(subject, s))  # type: ignore[misc]
        gone.append(candidates[at])
    sub = without(subject, gone)
    note = f"left in this order: {', '.join(map(str, gone)) or 'none'}"
    return Outcome(extract(subject.model, subject.family, sub), sub, (note,))


def least(subject: Subject, subs: Sequence[SubNetwork]) -> int:
    """Which of some networks has the least loss on the first judging window."""
    windows = subject.judged()[:1]
    judge = Divergence(subject.stream, windows, kind="ppl", windows=(1,), stride=1)
    with subject.progress(f"{len(subs)} candidates", len(subs) * windows.numel()) as advance:
        values = [v[0] for v in judge.measure(subs, [0])]
        advance(len(subs) * windows.numel())
    subject.count(judge.forward_tokens)
    return values.index(min(values))
