"""Floor 3: the control that every search needs: the best of random networks of the right size, at the same budget.

Units are sorted as for Shen et al.; widths are drawn at random, judged by the same perplexity of networks that are not
reformed on the same window, for about `search_tokens` forward tokens.
"""

from __future__ import annotations

import random

from prunus.baselines.shen_search import SLACK, evaluations, sorted_by, space_for
from prunus.baselines.subject import Outcome, Subject
from prunus.models import costs
from prunus.models.slicing import extract, sort
from prunus.models.stream import LayerStream
from prunus.searching.moves import Prices, scatter
from prunus.searching.objective import Divergence


def compress(subject: Subject, keep: float) -> Outcome:
    """The best of the candidates, as it is."""
    model = subject.copy()
    sort(model, subject.family, sorted_by(subject))
    space, rng = space_for(subject), random.Random(f"random {subject.seed} {keep:g}")

    def cost(sub: object) -> float:
        return costs.parameters(subject.layout, sub)  # type: ignore[arg-type]

    window = space.window(cost, keep, of=subject.blocks, slack=SLACK)
    prices = Prices(space, cost)
    subs = [scatter(prices, window, rng) for _ in range(evaluations(subject))]
    judge = Divergence(LayerStream(model, subject.family), subject.judged()[:1], kind="ppl", windows=(1,), stride=1)
    with subject.progress("random networks", len(subs)) as advance:
        values = [v[0] for v in judge.measure(subs, [0])]
        advance(len(subs))
    subject.count(judge.forward_tokens)
    sub = subs[values.index(min(values))]
    return Outcome(extract(model, subject.family, sub), sub, (f"{len(subs)} candidates",))
