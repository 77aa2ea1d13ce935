"""One of several processes that share a search on a tiny model: `python worker.py STORAGE OUT METHOD [DIES_AFTER]`.

With DIES_AFTER it kills itself, as `kill -9` does, in the middle of that evaluation. Else OUT says what it found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny, tokens

from prunus.models import costs
from prunus.models.families import family_of
from prunus.models.stream import LayerStream
from prunus.searching import storage
from prunus.searching.objective import Divergence
from prunus.searching.pareto import explore
from prunus.searching.search import LevelSettings, LocalSettings, levels, local, sampled
from prunus.searching.space import SearchSpace, space_of
from prunus.searching.study import Ledger, Record
from prunus.subnetwork import SubNetwork

PAUSE = 0.02  # seconds for each candidate, so that both processes come to work


class Watched(Divergence):
    """Counts what it computes, and may die in it."""

    n_calls = 0
    dies_after: int | None = None
    pause = 0.0

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[list[float]]:
        for values in super().__call__(subs, draw, rung):
            time.sleep(self.pause)
            if self.n_calls == self.dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.n_calls += 1
            yield values


def objective() -> Watched:
    """KL of a tiny random llama's sub-networks."""
    torch.set_num_threads(1)
    model = tiny("llama")
    stream = LayerStream(model, family_of(model.config))
    return Watched(stream, tokens(16, 24, seed=3), windows=(1, 2, 4), holdout=tokens(8, 24, seed=4), stride=1)


def space_and_cost(judge: Divergence) -> tuple[SearchSpace, Any]:
    model: Any = judge.stream.model
    layout = costs.layout(model, judge.stream.family)
    return space_of(model.config, mlp_step=8), lambda sub: float(costs.parameters(layout, sub, "blocks"))


def search_in(where: str | None, method: str, judge: Divergence, n_workers: int = 2) -> Any:
    """What the search comes to, as plain data, and the record that it left."""
    space, cost = space_and_cost(judge)
    record = Record.open(
        where, space, costs={"parameters": cost}, belongs_to={"model": "tiny llama"}, n_workers=n_workers
    )
    window, given = space.window(cost, 0.6, slack=0.02), {"seed": 1, "record": record}
    if method == "levels":
        found = levels(space, judge, cost, window, settings=LevelSettings(generations=4, offspring=6), **given)
    elif method == "local":
        found = local(space, judge, cost, window, settings=LocalSettings(generations=5, neighbours=6), rung=1, **given)
    elif method == "tpe":
        found = sampled(space, judge, cost, window, "tpe", generations=5, population=6, rung=1, **given)
    else:
        ledger = Ledger(record, judge, "front")
        axes = (lambda subs: [one.value for one in ledger.judge(subs, 0, 0)], lambda subs: [cost(sub) for sub in subs])
        whole = cost(space.largest())
        points = explore(space, axes, cost, "nsga2", (0.4 * whole, whole), n_trials=30, batch=6, seed=1)
        return [[point.subnetwork.to_json(), *point.values] for point in points], record
    data = [found.subnetwork.to_json(), list(found.score.windows), found.n_tokens, found.n_evaluations]
    return data, record


def main() -> None:
    where, out, method, *dies_after = sys.argv[1:]
    storage.BEAT, storage.GRACE = 1, 5
    judge = objective()
    judge.pause = PAUSE
    judge.dies_after = int(dies_after[0]) if dies_after else None
    data, _ = search_in(where, method, judge)
    Path(out).write_text(json.dumps({"found": data, "n_calls": judge.n_calls}))


if __name__ == "__main__":
    main()
