"""Floor 2: the record of a search: an Optuna study in a journal file or a database, the memory that makes it resumable.

A search is a deterministic function of its seed and of the scores it is given. Scores that the journal holds are not
computed again, so the same call resumes: it replays what is known in seconds and goes on. Several processes may run
the same call on one journal or database; they then share the work and come to the same answer.
"""

from __future__ import annotations

import base64
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, IntDistribution

from prunus.errors import UserError
from prunus.searching import storage
from prunus.searching.claims import Claims, Key, LockClaims, TrialClaims
from prunus.searching.space import Cost, SearchSpace
from prunus.subnetwork import SubNetwork

Tell = Callable[[str], None]  # told one line for each generation
Score = float | Sequence[float]  # lower is better; a sequence has one value for each window of tokens


class Objective(Protocol):
    """What a search asks about sub-networks."""

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterable[Score]:
        """One score for each sub-network, lower is better; a generator's scores are recorded as they come.

        draw: which tokens. The same draw gives every sub-network the same tokens. Draws from 0 up are for searching;
            negative ones must use tokens that no draw from 0 up uses.
        rung: how many tokens; a higher rung costs more and is more precise.
        Subs come sorted by their layers, so that neighbours share the longest prefix.
        """
        ...

    def n_tokens(self, rung: int) -> int:
        """Forward tokens that one sub-network costs on a rung."""
        ...


@dataclass(frozen=True)
class Trial:
    """One evaluated sub-network."""

    number: int
    subnetwork: SubNetwork
    values: tuple[float, ...]  # the score, then the cost that the study minimises too, if any
    windows: tuple[float, ...]  # the score of each window; empty if the objective gives none
    cost: dict[str, float]
    draw: int
    rung: int
    method: str
    seconds: float
    n_tokens: int

    @property
    def value(self) -> float:
        """Score, lower is better."""
        return self.values[0]


@dataclass(frozen=True)
class Judged:
    """A sub-network's score on one draw and rung."""

    value: float
    windows: tuple[float, ...] = ()


class Record:
    """The trials of one study. Mutable: `judge` adds to it, other processes may add to its storage.

    objective: the name of what is minimised; one storage can hold a study for each.
    costs: named cost functions, noted with every trial; the first is the study's second objective.
    n_workers: how many processes work on this study; more than 1 makes each take small bites.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        costs: Mapping[str, Cost],
        claims: Claims | None = None,
        n_workers: int = 1,
    ) -> None:
        self.study, self.space, self.costs = study, space, costs
        self.n_workers = n_workers
        self._claims: Claims = claims or LockClaims(None)
        self._distributions = distributions(space)
        self._memo: dict[Key, Judged] = {}
        self._n_read = 0
        self.sync()

    @classmethod
    def open(
        cls,
        path: Path | str | None,
        space: SearchSpace,
        *,
        objective: str = "kl_nats",
        costs: Mapping[str, Cost] | None = None,
        belongs_to: Mapping[str, str] | None = None,
        n_workers: int = 1,
        study: str | None = None,
    ) -> Record:
        """Open or create a study in a journal file or, by its URL, a database (`None`: in memory).

        belongs_to: what the scores depend on (model, calibration tokens, ...), with the space's own key.
        study: a name before the objective's, where a storage holds studies of several models.
        Raises UserError naming what differs where the study belongs to something else, and for a database that cannot
        be used.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        costs = dict(costs or {})
        name = f"{study} {objective}" if study else objective
        shared = storage.database(str(path)) if storage.is_url(path) else None
        where = shared or (None if path is None else storage.journal(Path(path)))
        opened = optuna.create_study(
            study_name=name, storage=where, directions=["minimize"] * (2 if costs else 1), load_if_exists=True
        )
        owner = {"space": space.key(), "objectives": ", ".join([objective, *list(costs)[:1]]), **(belongs_to or {})}
        if opened.user_attrs.get("belongs_to") is None:
            opened.set_user_attr("belongs_to", owner)
        theirs = opened.user_attrs["belongs_to"]  # another process may have been faster
        if theirs != owner:
            differs = sorted(k for k in theirs.keys() | owner.keys() if theirs.get(k) != owner.get(k))
            raise UserError(
                f"the study {name!r} in {path} belongs to another "
                + ", ".join(f"{k} ({theirs.get(k)}, now {owner.get(k)})" for k in differs)
                + "; use another run directory, the settings that it was started with, or in a shared storage another "
                "search.study"
            )
        if shared is not None:
            return cls(opened, space, costs, TrialClaims(shared, opened), max(2, n_workers))
        return cls(opened, space, costs, None if path is None else LockClaims(Path(f"{path}.claims")), n_workers)

    def sync(self) -> None:
        """Take in what other processes have recorded."""
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials[self._n_read :]:
            attrs = trial.user_attrs
            if trial.values is not None and "subnetwork" in attrs:  # others' trials may have another form
                key = (attrs["key"], attrs["draw"], attrs["rung"])
                self._memo.setdefault(key, Judged(trial.values[0], tuple(attrs["windows"])))
        self._n_read = len(trials)

    def trials(self) -> list[Trial]:
        """All trials, oldest first."""
        return [
            Trial(
                trial.number,
                _unpacked(trial.user_attrs["subnetwork"]),
                tuple(trial.values),
                tuple(trial.user_attrs["windows"]),
                dict(trial.user_attrs["cost"]),
                **{k: trial.user_attrs[k] for k in ("draw", "rung", "method", "seconds", "n_tokens")},
            )
            for trial in self.study.get_trials(deepcopy=False)
            if trial.values is not None and "subnetwork" in trial.user_attrs
        ]

    @property
    def n_tokens(self) -> int:
        """Forward tokens spent on all trials of the study."""
        trials = self.study.get_trials(deepcopy=False)
        return sum(int(trial.user_attrs.get("n_tokens", 0)) for trial in trials)

    def judge(
        self,
        objective: Objective,
        subs: Sequence[SubNetwork],
        draw: int,
        rung: int,
        *,
        method: str,
        budget: tuple[float, float] | None = None,
    ) -> list[Judged]:
        """Scores of sub-networks, from the record where it has them; new ones are recorded one by one.

        A killed process loses at most the candidate that it was computing.
        """
        keys = [(sub.key(), draw, rung) for sub in subs]
        wanted = dict(zip(keys, subs, strict=True))
        if any(key not in self._memo for key in wanted):
            self.sync()
        wait = 0.02
        while missing := {key: sub for key, sub in wanted.items() if key not in self._memo}:
            with self._claims.take(*_bite(missing, self.n_workers)) as mine:
                self.sync()  # another process may have finished one between the look and the claim
                mine = [key for key in mine if key not in self._memo]
                if mine:
                    self._compute(objective, [wanted[key] for key in mine], draw, rung, method, budget)
                    wait = 0.02
                    continue
            if any(key not in self._memo for key in wanted):  # all that is left is being computed by others
                time.sleep(wait)
                wait = min(2 * wait, 1.0)
                self.sync()
        return [self._memo[key] for key in keys]

    def _compute(
        self,
        objective: Objective,
        subs: list[SubNetwork],
        draw: int,
        rung: int,
        method: str,
        budget: tuple[float, float] | None,
    ) -> None:
        n_tokens, scores = objective.n_tokens(rung), iter(objective(subs, draw, rung))
        for sub in subs:
            start = time.perf_counter()
            judged = _judged(next(scores))
            seconds = time.perf_counter() - start
            cost = {name: float(f(sub)) for name, f in self.costs.items()}
            self._add(sub, judged, cost, draw, rung, method, seconds, n_tokens, budget)

    def _add(
        self,
        sub: SubNetwork,
        judged: Judged,
        cost: dict[str, float],
        draw: int,
        rung: int,
        method: str,
        seconds: float,
        n_tokens: int,
        budget: tuple[float, float] | None,
    ) -> None:
        attrs: dict[str, Any] = {
            "key": sub.key(),
            "subnetwork": _packed(sub),
            "windows": list(judged.windows),
            "cost": cost,
            "draw": draw,
            "rung": rung,
            "method": method,
            "seconds": round(seconds, 6),
            "n_tokens": n_tokens,
            "budget": None if budget is None else list(budget),
        }
        self.study.add_trial(
            optuna.trial.create_trial(
                values=[judged.value, *list(cost.values())[:1]],
                params=params(sub),
                distributions=self._distributions,
                user_attrs=attrs,
            )
        )
        self.sync()  # where two processes computed the same, the first one's score counts for both


def _bite(missing: Mapping[Key, SubNetwork], n_workers: int) -> tuple[list[Key], int]:
    """Keys to claim next, sorted so that neighbours share their first layers, and how many of them."""
    keys = sorted(missing, key=lambda k: _path(missing[k]))
    if n_workers == 1:
        return keys, len(keys)
    start = os.getpid() * len(keys) // 7 % len(keys)  # processes begin at different places
    return keys[start:] + keys[:start], max(1, len(keys) // (2 * n_workers))


def _packed(sub: SubNetwork) -> str:
    """JSON; compressed where members are named, which can be tens of thousands of numbers."""
    text = sub.to_json()
    return "zlib:" + base64.b85encode(zlib.compress(text.encode(), 9)).decode() if sub.kept else text


def _unpacked(text: str) -> SubNetwork:
    if text.startswith("zlib:"):
        text = zlib.decompress(base64.b85decode(text[5:])).decode()
    return SubNetwork.from_json(text)


def _path(sub: SubNetwork) -> tuple[Any, ...]:
    kept = [repr(k) for k in sub.kept] or [""] * len(sub.layers)
    return (sub.hidden, *((s.kv_heads, s.q_per_kv, s.mlp, k) for s, k in zip(sub.layers, kept, strict=True)))


def _judged(score: Score) -> Judged:
    if isinstance(score, int | float):
        return Judged(math.inf if math.isnan(score) else float(score))
    windows = tuple(math.inf if math.isnan(w) else float(w) for w in score)
    return Judged(sum(windows) / len(windows), windows)


def params(sub: SubNetwork) -> dict[str, int]:
    """A sub-network as Optuna parameters: L03.kv_heads, L03.q_per_kv, L03.mlp, ..., hidden."""
    digits = max(2, len(str(len(sub.layers) - 1)))
    named = {
        f"L{i:0{digits}}.{unit}": int(getattr(shape, unit))
        for i, shape in enumerate(sub.layers)
        for unit in ("kv_heads", "q_per_kv", "mlp")
    }
    return {**named, "hidden": sub.hidden}


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The ranges of `params`, from 0 (or the smallest hidden size) to the largest option."""
    largest = params(space.largest())
    for i, name in enumerate(n for n in list(largest) if n.endswith("q_per_kv")):
        largest[name] = max(q for _, q in space.attention[i])
    for i, name in enumerate(n for n in list(largest) if n.endswith("kv_heads")):
        largest[name] = max(kv for kv, _ in space.attention[i])
    least = {name: space.hidden[-1] if name == "hidden" else 0 for name in largest}
    return {name: IntDistribution(least[name], most) for name, most in largest.items()}


class Ledger:
    """What one search has asked for: the same on a replay as on the first run, whoever computed the scores."""

    def __init__(
        self, record: Record, objective: Objective, method: str, budget: tuple[float, float] | None = None
    ) -> None:
        self.record, self.objective, self.method, self.budget = record, objective, method, budget
        self.n_tokens = 0
        self.n_evaluations = 0
        self._asked: set[Key] = set()

    def judge(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> list[Judged]:
        """Scores, in the order of `subs`; each sub-network, draw and rung is paid for once."""
        new = {(sub.key(), draw, rung) for sub in subs} - self._asked
        self._asked |= new
        self.n_evaluations += len(new)
        self.n_tokens += len(new) * self.objective.n_tokens(rung)
        return self.record.judge(self.objective, subs, draw, rung, method=self.method, budget=self.budget)


__all__ = ["Judged", "Ledger", "Objective", "Record", "Score", "Tell", "Trial", "distributions", "params"]
