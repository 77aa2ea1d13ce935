"""Laws of fronts: what is on one, its volume, and that every search for one beats chance at equal evaluations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from tiny import GQA
from toy import Toy, blocks, llama_space
from transformers import LlamaConfig

from prunus.searching.allocate import allocate
from prunus.searching.moves import Prices, predictor
from prunus.searching.pareto import explore, front, guided, hypervolume, nsga2
from prunus.searching.space import SearchSpace, space_of
from prunus.searching.study import Record
from prunus.subnetwork import SubNetwork


def test_the_front_is_what_nothing_dominates() -> None:
    rng = random.Random(0)
    points = [(rng.randint(0, 20) / 4, rng.randint(0, 20) / 4) for _ in range(200)]
    best = front(points, lambda p: p)
    for p in points:
        dominated = any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
        assert dominated != (p in best)
    assert best == sorted(best, key=lambda p: p[1])
    assert front(reversed(points), lambda p: p) == best
    three = [(*p, rng.randint(0, 5)) for p in points]
    for t in front(three, lambda p: p):
        assert not any(q != t and all(a <= b for a, b in zip(q, t, strict=True)) for q in three)


def test_hypervolume_is_an_area() -> None:
    assert hypervolume([], (2, 2)) == 0
    assert hypervolume([(1, 1)], (2, 3)) == 2
    assert hypervolume([(0, 2), (1, 1), (1.5, 1.5), (5, 0)], (3, 3)) == 5
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (12, 2))
    grid = (np.arange(1000) + 0.5) / 1000
    covered = np.zeros((1000, 1000), dtype=bool)
    for a, b in points:
        covered |= (grid[:, None] >= a) & (grid[None] >= b)
    assert hypervolume([(float(a), float(b)) for a, b in points], (1, 1)) == pytest.approx(covered.mean(), abs=3e-3)


@pytest.mark.parametrize("uniform", [False, True])
def test_nsga2_improves_a_whole_front(tmp_path: Path, uniform: bool) -> None:
    space = llama_space(uniform=uniform)
    reference = (Toy(space).truth(space.smallest()), blocks(space.largest()))

    def volume(n: int, path: Path | None, toy: Toy) -> float:
        record = Record.open(path, space, costs={"parameters": blocks})
        found = nsga2(space, toy, blocks, n_trials=n, population=10, start=[space.largest()], record=record)
        assert all(t.method == "nsga2" for t in found)
        assert [t.cost["parameters"] for t in found] == sorted(t.cost["parameters"] for t in found)
        assert found[-1].subnetwork == space.largest()  # it loses nothing, so nothing dominates it
        return hypervolume([(t.value, t.values[1]) for t in found], reference)

    path = tmp_path / "trials.journal"
    few = volume(20, path, Toy(space))
    again = Toy(space)
    many = volume(120, path, again)
    assert again.n_calls <= 100  # the first 20 are replayed
    assert many > few
    assert many == volume(120, None, Toy(space))


def test_nsga2_keeps_inside_a_budget() -> None:
    space = llama_space()
    window = space.window(blocks, 0.8)[0] / 2, space.window(blocks, 0.8)[1]
    for trial in nsga2(space, Toy(space), blocks, budget=window, n_trials=30):
        assert window[0] <= blocks(trial.subnetwork) <= window[1]


def test_hypervolume_is_a_volume() -> None:
    assert hypervolume([(1, 1, 1)], (2, 3, 4)) == 6
    assert hypervolume([(0, 0, 1), (1, 1, 0)], (2, 2, 2)) == 4 + 1
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 1, (10, 3))
    some = rng.uniform(0, 1, (200_000, 3))
    covered = (some[:, None] >= points[None]).all(2).any(1).mean()
    assert hypervolume([tuple(p) for p in points], (1, 1, 1)) == pytest.approx(covered, abs=5e-3)


def axes_of(toy: Toy, calls: list[int] | None = None) -> list[Any]:
    def loss(subs: Sequence[SubNetwork]) -> list[float]:
        if calls is not None:
            calls.append(len(subs))
        return [toy.truth(sub) for sub in subs]

    def heads(subs: Sequence[SubNetwork]) -> list[float]:
        return [float(sum(s.kv_heads for s in sub.layers)) for sub in subs]

    return [loss, lambda subs: [blocks(sub) for sub in subs], heads]


def deep_space() -> SearchSpace:
    """Of twelve layers: among a handful of widths random draws are hard to beat."""
    return space_of(LlamaConfig(**{**GQA, "num_hidden_layers": 12}, head_dim=8), mlp_step=8)


@pytest.mark.parametrize("method", ["levels", "nsga2", "tpe", "local"])
def test_a_searched_front_betters_its_starts_and_a_random_one_at_equal_evaluations(method: Any) -> None:
    """It begins, as in a run, from allocations that know nothing of how layers depend on each other."""
    own = method == "levels"  # goes by a prediction, which must be worth something: .97 in rank on SmolLM2-135M
    space, n, pairs = (deep_space(), 120, 0.3) if own else (llama_space(), 60, 1.0)
    whole = blocks(space.largest())
    window = (0.4 * whole, whole)
    for seed in range(2):
        toy, prices = Toy(space, seed, pairs=pairs), Prices(space, blocks)
        guess = predictor(space, toy.errors()) if own else None
        budgets = [share * whole - blocks(space.smallest()) for share in (0.45, 0.6, 0.75, 0.9)]
        starts = [space.build((*allocate(prices.tables(), toy.errors(), b).levels, 0)) for b in budgets]
        reference = (toy.truth(space.smallest()), whole)
        volumes = [hypervolume([(toy.truth(sub), blocks(sub)) for sub in starts], reference)]
        for name in ("random", method):
            calls = list[int]()
            axes = axes_of(toy, calls)[:2]
            points = explore(
                space, axes, blocks, name, window, n_trials=n, batch=12, seed=seed, start=starts, predict=guess
            )
            assert len(points) == sum(calls) == n
            assert max(calls) == 12
            assert all(window[0] <= blocks(p.subnetwork) <= window[1] for p in points)
            assert [p.values for p in points] == [(toy.truth(p.subnetwork), blocks(p.subnetwork)) for p in points]
            volumes.append(hypervolume([p.values for p in points], reference))
        assert volumes[2] > 1.02 * volumes[0]
        assert volumes[2] > volumes[1]


@pytest.mark.parametrize("method", ["levels", "nsga2", "tpe", "local", "random"])
def test_the_same_seed_gives_the_same_networks(method: Any) -> None:
    space, whole = llama_space(), blocks(llama_space().largest())

    def some(seed: int) -> list[Any]:
        return explore(
            space, axes_of(Toy(space))[:2], blocks, method, (0.5 * whole, whole), n_trials=24, batch=8, seed=seed
        )

    assert some(1) == some(1)
    assert some(1) != some(2)


@pytest.mark.parametrize("method", ["levels", "nsga2", "tpe", "local", "random"])
def test_three_objectives(method: Any) -> None:
    space = llama_space()
    toy, whole = Toy(space), blocks(space.largest())
    start = [space.largest(), space.build([1] * (len(space.genes) - 1) + [0])]
    points = explore(space, axes_of(toy), blocks, method, (0.3 * whole, whole), n_trials=40, batch=8, start=start)
    best = front(points, lambda p: p.values)
    assert len(best) > 3
    assert all(len(p.values) == 3 for p in points)
    if method != "random":  # the control takes no start
        assert start[0] in [p.subnetwork for p in points[:8]]


def test_level_switches_try_every_size_as_often_and_follow_the_prediction() -> None:
    space = deep_space()
    toy, whole = Toy(space, 1, pairs=1.0), blocks(space.largest())
    window, loss = (0.4 * whole, whole), axes_of(toy)[:2]
    start = [space.largest(), space.build([1] * (len(space.genes) - 1) + [0])]
    means = []
    for predict in (None, toy.truth):
        points = explore(
            space, loss, blocks, "levels", window, start=start, predict=predict, n_trials=122, batch=12, seed=3
        )
        counts, _ = np.histogram([p.values[1] / whole for p in points[2:]], bins=6, range=(0.4, 1.0))
        assert counts.min() >= 10  # of 20, in parts of other widths
        means.append(np.mean([p.values[0] for p in points[2:]]))
    assert means[1] < 0.98 * means[0]


def test_level_switches_spread_over_every_cost_in_turn() -> None:
    space = llama_space()
    axes, whole = axes_of(Toy(space)), blocks(space.largest())

    def heads(sub: SubNetwork) -> float:
        return float(axes[2]([sub])[0])

    most = heads(space.largest())
    points = explore(
        space, axes, blocks, "levels", (0.4 * whole, whole), others=[(heads, (most / 2, most))], n_trials=48, batch=12
    )
    assert len(points) == 48
    second = points[12:24]  # the first were random, of sizes by the first cost
    counts, _ = np.histogram([p.values[2] for p in second], bins=3, range=(most / 2, most))
    assert counts.min() >= 3


def test_the_control_has_networks_of_all_sizes() -> None:
    """Uniform draws of widths would nearly all be of one size, and lose to any search at the others."""
    space = llama_space()
    whole = blocks(space.largest())
    points = explore(space, axes_of(Toy(space))[1:2], blocks, "random", (0.4 * whole, whole), n_trials=300, batch=50)
    counts, _ = np.histogram([p.values[0] / whole for p in points], bins=6, range=(0.4, 1.0))
    assert counts.min() > 25
    uniform, _ = np.histogram(
        [blocks(space.sample(random.Random(k))) / whole for k in range(300)], bins=6, range=(0.4, 1.0)
    )
    assert uniform.min() < 25


def test_a_sampler_is_told_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks for may lie outside the window; the network that this was moved to has other levels."""
    studies = list[optuna.Study]()
    create = optuna.create_study

    def noted(**given: Any) -> optuna.Study:
        studies.append(create(**given))
        return studies[-1]

    monkeypatch.setattr(optuna, "create_study", noted)
    space, toy = llama_space(), Toy(llama_space())
    window = space.window(blocks, 0.5)
    own = optuna.samplers.NSGAIISampler(population_size=8, seed=0)
    points = guided(space, axes_of(toy)[:2], blocks, own, window=window, n_trials=24, batch=8)
    done = [t for t in studies[0].trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == 24
    key = lambda pair: (pair[0].key(), pair[1])  # noqa: E731
    told = [(space.build([t.params[g.name] for g in space.genes]), tuple(t.values)) for t in done]
    assert sorted(told, key=key) == sorted([(p.subnetwork, p.values) for p in points], key=key)
    generations = sorted(next(v for k, v in t.system_attrs.items() if k.endswith(":generation")) for t in done)
    assert generations == [0] * 8 + [1] * 8 + [2] * 8


def test_small_spaces_are_used_up() -> None:
    space = llama_space(uniform=True, mlp_step=80, attention="none")
    points = explore(space, axes_of(Toy(space))[:2], blocks, "random", (0.0, blocks(space.largest())), n_trials=50)
    assert len(points) == 4  # as many layers
