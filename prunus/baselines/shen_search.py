"""Floor 3: Shen et al. 2024 (arXiv:2409.17372) from beginning to end: importance, evolution, then ADMM.

`prunus.searching.shen` has the evolution with its published probabilities. It stands on the importance of eq. 1-3,
judges the perplexity of networks that are not reformed on a fixed sample of the calibration text, and the winner's
writers are reformed by 30 iterations of ADMM (eq. 7-9, mended as docs/search.md says). Only the budget is not theirs,
50 generations of 100: about `search_tokens` forward tokens for a network, divided among `generations`, with populations
in the published shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.baselines.subject import Outcome, Subject
from prunus.models import costs
from prunus.models.families import dims
from prunus.models.slicing import extract, sort
from prunus.models.stream import LayerStream
from prunus.reforming import levels
from prunus.scoring import importance, moments
from prunus.searching import shen
from prunus.searching.objective import Divergence
from prunus.searching.space import SearchSpace, space_of
from prunus.subnetwork import SubNetwork

Start = Literal["importance", "random"]
SLACK = 0.005  # how far below the budget a network may stay
ITERATIONS = 30  # of ADMM


def compress(subject: Subject, keep: float, *, iterations: int = ITERATIONS, start: Start = "importance") -> Outcome:
    """The best network that the evolution finds, reformed.

    start: the first masks keep the most important units, or random ones (the control of the paper's figure 3).
    """
    orders = sorted_by(subject) if start == "importance" else shuffled(subject)
    model = subject.copy()
    sort(model, subject.family, orders)
    space, judge = space_for(subject), judge_of(subject, model)
    settings = evolution(subject)
    with subject.progress("evolution of Shen et al.", settings.generations) as advance:
        found = shen.shen(
            space, judge, lambda sub: costs.parameters(subject.layout, sub),
            space.window(lambda sub: costs.parameters(subject.layout, sub), keep, of=subject.blocks, slack=SLACK),
            target=keep, seed=subject.seed, settings=settings, progress=lambda _: advance(1),
        )  # fmt: skip
    subject.count(judge.forward_tokens)
    sub = found.subnetwork
    note = f"{found.n_evaluations} candidates, {found.generations} generations of {settings.population}"
    return Outcome(reformed(subject, model, orders, sub, iterations), sub, (note,))


def reformed(
    subject: Subject, model: Any, orders: Mapping[str, Tensor], sub: SubNetwork, iterations: int = ITERATIONS
) -> nn.Module:
    """The network that a search chose, with its writers reformed by ADMM; 0 iterations leave them as they are.

    model: the dense one, sorted by `orders`.
    """
    if not iterations:
        return extract(model, subject.family, sub)
    folder = subject.once("grams", lambda: grams(subject))
    database = levels.Levels(model, subject.family, folder, orders=orders, method="admm", iterations=iterations)
    return extract(model, subject.family, sub, database(sub))


def judge_of(subject: Subject, model: nn.Module) -> Divergence:
    """The loss of candidates, not reformed, on the first judging window."""
    return Divergence(LayerStream(model, subject.family), subject.judged()[:1], kind="ppl", windows=(1,), stride=1)


def evolution(subject: Subject) -> shen.ShenSettings:
    """The generations that were asked for, or as many of 10 as the budget pays for; populations are the rest of it."""
    n = evaluations(subject)
    population = max(10, n // subject.generations)
    return shen.ShenSettings.sized(population, max(1, min(subject.generations, n // 10)))


def evaluations(subject: Subject) -> int:
    """Candidates that the budget pays for, each judged on one window."""
    return max(10, subject.search_tokens // int(subject.judged().shape[1]))


def space_for(subject: Subject) -> SearchSpace:
    """Per-layer widths, MLPs in steps of a 48th."""
    return space_of(subject.model.config, mlp_step=max(1, dims(subject.model.config)["mlp"] // 48))


def sorted_by(subject: Subject) -> Mapping[str, Tensor]:
    """Orders of all units by the importance of eq. 1-3, most important first."""

    def compute() -> dict[str, Tensor]:
        n = len(subject.stream)
        with subject.progress("importance (OBS)", n * subject.ids.numel()) as advance:
            found = importance.score(
                subject.model, subject.family, subject.ids, "obs", micro=subject.micro, advance=advance
            )
        subject.count(subject.ids.numel())
        return {unit: order for unit, order in found.order().items() if unit != "hidden"}

    return subject.once("obs", compute)


def shuffled(subject: Subject) -> Mapping[str, Tensor]:
    """Random orders of all units, as `sorted_by` gives them."""
    generator = torch.Generator().manual_seed(subject.seed)
    return {
        unit: torch.rand(order.shape, generator=generator).argsort(-1)
        for unit, order in levels.unsorted(subject.model).items()
    }


def grams(subject: Subject) -> Path:
    """Gram matrices of the writers' inputs in the dense model, on disk."""
    folder = subject.folder() / "grams"
    folder.mkdir(exist_ok=True)

    def use(i: int, found: moments.Grams) -> None:
        levels.save_grams(found, folder, i)

    n = len(subject.stream)
    with subject.progress("second moments", n * subject.ids.numel()) as advance:
        moments.collect(subject.stream, subject.ids, use, micro=subject.micro, advance=advance)
    subject.count(subject.ids.numel())
    return folder
