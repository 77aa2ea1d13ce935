"""Floor 3: the control that every search needs: the best of random networks of the right size, at the same budget.

As for Shen et al., units are sorted by importance, networks that are not reformed are judged by their loss on one
window for about `search_tokens` forward tokens, and the winner's writers are reformed by ADMM; only the widths are
drawn at random.
"""

from __future__ import annotations

import random

from prunus.baselines.shen_search import SLACK, evaluations, judge_of, reformed, sorted_by, space_for
from prunus.baselines.subject import Outcome, Subject
from prunus.models import costs
from prunus.models.slicing import sort
from prunus.searching.moves import Prices, scatter


def compress(subject: Subject, keep: float) -> Outcome:
    """The best of the candidates, reformed."""
    orders = sorted_by(subject)
    model = subject.copy()
    sort(model, subject.family, orders)
    space, rng = space_for(subject), random.Random(f"random {subject.seed} {keep:g}")

    def cost(sub: object) -> float:
        return costs.parameters(subject.layout, sub)  # type: ignore[arg-type]

    window = space.window(cost, keep, of=subject.blocks, slack=SLACK)
    prices = Prices(space, cost)
    subs = [scatter(prices, window, rng) for _ in range(evaluations(subject))]
    judge = judge_of(subject, model)
    with subject.progress("random networks", len(subs)) as advance:
        values = [v[0] for v in judge.measure(subs, [0])]
        advance(len(subs))
    subject.count(judge.forward_tokens)
    sub = subs[values.index(min(values))]
    return Outcome(reformed(subject, model, orders, sub), sub, (f"{len(subs)} candidates",))
