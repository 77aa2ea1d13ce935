"""Laws of the searches, on objectives whose best answer is known: no model, no tokens."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from tiny import CONFIGS

from prunus.allocate import allocate
from prunus.errors import UserError
from prunus.moves import Prices, fit, gene_errors, mutate, predictor, scatter, settle
from prunus.search import Found, LevelSettings, front, hypervolume, levels, nsga2, random_search
from prunus.shen import RANGES, ShenSettings, mutate_mask, ranges_of, shen
from prunus.space import SearchSpace, space_of
from prunus.study import Record, params
from prunus.subnetwork import LayerShape, SubNetwork


def blocks(sub: SubNetwork) -> float:
    """Weights of a llama with head_dim 8 and hidden size 48."""
    return 48.0 * sum(16 * s.kv_heads * s.q_per_kv + 16 * s.kv_heads + 3 * s.mlp for s in sub.layers)


def llama_space(**given: Any) -> SearchSpace:
    return space_of(CONFIGS["llama"](), **{"mlp_step": 8, **given})


class Toy:
    """Separable errors plus interactions of neighbouring layers, plus noise that paired windows share in part."""

    def __init__(
        self, space: SearchSpace, seed: int = 0, pairs: float = 0.0, noise: float = 0.0, n_windows: int = 8
    ) -> None:
        rng = np.random.default_rng(seed)
        self.space, self.noise, self.n_windows = space, noise, n_windows
        self.weight = rng.uniform(0.2, 2.0, (space.n_layers, 2))
        self.power = rng.uniform(1.0, 3.0, (space.n_layers, 2))
        self.pairs = pairs * rng.uniform(0, 1, space.n_layers)
        self.n_calls = 0

    def lost(self, sub: SubNetwork) -> np.ndarray:
        whole = self.space.largest().layers
        return np.array(
            [
                (1 - s.kv_heads * s.q_per_kv / (w.kv_heads * w.q_per_kv), 1 - s.mlp / w.mlp)
                for s, w in zip(sub.layers, whole, strict=True)
            ]
        )

    def truth(self, sub: SubNetwork) -> float:
        lost = self.lost(sub)
        both = lost.sum(1)
        return float((self.weight * lost**self.power).sum() + (self.pairs[1:] * both[1:] * both[:-1]).sum())

    def errors(self) -> list[np.ndarray]:
        """The separable part, as curves over the genes of the space."""
        return [
            np.array(
                [
                    self.weight[i, part] * (1 - _share(option, gene.options[0])) ** self.power[i, part]
                    for option in gene.options
                ]
            )
            for (i, part), gene in zip(
                itertools.product(range(self.space.n_layers), (0, 1)), self.space.genes, strict=False
            )
        ]

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[Sequence[float]]:
        n = self.n_windows * 4**rung
        for sub in subs:
            self.n_calls += 1
            common = np.random.default_rng([abs(draw), draw < 0, 7]).normal(size=self.n_windows * 64)[:n]
            own = np.random.default_rng([abs(draw), draw < 0, int(sub.key()[:8], 16)]).normal(size=n)
            yield [float(x) for x in self.truth(sub) + self.noise * (common + 0.3 * own)]

    def n_tokens(self, rung: int) -> int:
        return 100 * 4**rung


def _share(option: Any, whole: Any) -> float:
    return float(np.prod(option) / np.prod(whole))


def brute_force(space: SearchSpace, toy: Toy, window: tuple[float, float]) -> SubNetwork:
    every = (space.build(choice) for choice in itertools.product(*(range(len(gene.options)) for gene in space.genes)))
    return min((sub for sub in every if window[0] <= blocks(sub) <= window[1]), key=toy.truth)


def tiny_space() -> SearchSpace:
    heads = ((4, 2), (4, 1), (2, 1), (1, 1))
    return SearchSpace((heads, (*heads, (0, 0)), (*heads, (0, 0))), ((80, 60, 40, 20, 0),) * 3, (48,))


# ------------------------------------------------------------------------------------------------------ moves


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("uniform", [False, True])
def test_moves_stay_inside_the_window(keep: float, uniform: bool) -> None:
    space = llama_space(uniform=uniform, hidden=(48, 40))
    window = space.window(blocks, keep, slack=0.02)
    prices, rng = Prices(space, blocks), random.Random(0)
    sub = scatter(prices, window, rng)
    changed = 0
    for _ in range(60):
        assert window[0] <= blocks(sub) <= window[1]
        assert space.contains(sub)
        step = rng.choice([300.0, 3000.0, 30000.0])
        found = mutate(prices, space.levels(sub), window, rng, step=step, n_swaps=rng.randint(1, 3), leap=0.1)
        if found is not None:
            assert found != space.levels(sub)
            sub, changed = space.build(found), changed + 1
    assert changed > 30


def test_random_allocations_differ_and_use_the_whole_range() -> None:
    space = llama_space()
    window = space.window(blocks, 0.5)
    prices, rng = Prices(space, blocks), random.Random(1)
    subs = [scatter(prices, window, rng) for _ in range(100)]
    assert all(window[0] <= blocks(s) <= window[1] for s in subs)
    assert len(set(subs)) > 95
    widths = [layer.mlp for sub in subs for layer in sub.layers]
    assert {0, 80} <= set(widths)
    assert len(set(widths)) == 11


def test_other_budgets_and_spaces_seed_this_one() -> None:
    space, rng = llama_space(), random.Random(0)
    prices = Prices(space, blocks)
    for keep in (0.9, 0.6, 0.35):
        window = space.window(blocks, keep, slack=0.02)
        for other in (llama_space().largest(), scatter(prices, space.window(blocks, 0.5), rng)):
            found = fit(prices, other, window, rng)
            assert found is not None
            assert window[0] <= blocks(found) <= window[1]
    inside = scatter(prices, space.window(blocks, 0.5), rng)
    assert fit(prices, inside, space.window(blocks, 0.5), rng) == inside
    coarse = space_of(CONFIGS["llama"](), mlp_step=80, attention="none")
    assert settle(Prices(coarse, blocks), coarse.levels(coarse.largest()), (1.0, 2.0), rng) is None


def test_costs_that_are_no_sums_are_met_too() -> None:
    def crooked(sub: SubNetwork) -> float:  # a norm that leaves only with both sub-layers, and tiles of 32
        tiles = sum(48 * 3 * 32 * math.ceil(s.mlp / 32) + 768 * s.kv_heads for s in sub.layers)
        return tiles + 480.0 * sum(1 for s in sub.layers if s.attends or s.mlp)

    space = llama_space()
    window = space.window(crooked, 0.6, slack=0.02)
    rng, prices = random.Random(0), Prices(space, crooked)
    for _ in range(30):
        assert window[0] <= crooked(scatter(prices, window, rng)) <= window[1]


# ------------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("seed", range(2))
def test_level_switching_finds_what_brute_force_finds(seed: int) -> None:
    space = tiny_space()
    toy, window = Toy(space, seed, pairs=1.0), space.window(blocks, 0.6, slack=0.03)
    best = brute_force(space, toy, window)
    found = levels(space, toy, blocks, window, seed=seed, settings=LevelSettings(generations=40, patience=20))
    assert window[0] <= blocks(found.subnetwork) <= window[1]
    assert toy.truth(found.subnetwork) == pytest.approx(toy.truth(best), rel=1e-9)


def test_the_knapsack_is_the_best_start_where_errors_add_up() -> None:
    space = llama_space()
    toy = Toy(space)
    window = space.window(blocks, 0.5)
    prices = Prices(space, blocks)
    answer = allocate(prices.tables(), toy.errors(), window[1] - blocks(space.smallest()))
    start = space.build((*answer.levels, 0))
    assert blocks(start) <= window[1]
    assert predictor(space, toy.errors())(start) == pytest.approx(toy.truth(start)) == pytest.approx(answer.error)
    found = levels(space, toy, blocks, (0.0, window[1]), start=[start], settings=LevelSettings(generations=8))
    assert found.subnetwork == start


def test_search_beats_its_start_and_its_random_control_at_equal_tokens() -> None:
    space, gains = llama_space(), []
    window = space.window(blocks, 0.5)
    prices = Prices(space, blocks)
    for seed in (0, 2):
        toy = Toy(space, seed, pairs=1.0, noise=0.05)
        answer = allocate(prices.tables(), toy.errors(), window[1] - blocks(space.smallest()))
        start, predict = space.build((*answer.levels, 0)), predictor(space, toy.errors())
        settings = LevelSettings(generations=100, patience=100, n_tokens=40_000, survivors=(4,))
        found = levels(space, toy, blocks, window, start=[start], predict=predict, seed=seed, settings=settings)
        control = random_search(space, toy, blocks, window, seed=seed, settings=settings)
        for end in (found, control):
            assert end.n_tokens <= 40_000
            assert window[0] <= blocks(end.subnetwork) <= window[1]
            assert toy.truth(end.subnetwork) <= toy.truth(end.start)
        assert control.n_tokens > 36_000
        assert toy.truth(found.subnetwork) < toy.truth(control.subnetwork)
        gains.append(1 - toy.truth(found.subnetwork) / toy.truth(start))
    assert np.mean(gains) > 0.03


def test_noise_alone_changes_nothing_for_the_worse() -> None:
    """On fixed tokens a search would walk away from the optimum; fresh and held-out draws keep it there."""
    space = llama_space()
    toy = Toy(space, noise=0.5)
    window = space.window(blocks, 0.5)
    prices = Prices(space, blocks)
    start = space.build((*allocate(prices.tables(), toy.errors(), window[1] - blocks(space.smallest())).levels, 0))
    losses = []
    for seed in range(3):
        found = levels(space, toy, blocks, window, start=[start], seed=seed, settings=LevelSettings(generations=20))
        losses.append(toy.truth(found.subnetwork) / toy.truth(start) - 1)
    assert np.mean(losses) < 0.005


def test_the_same_seed_gives_the_same_answer_and_another_one_does_not() -> None:
    space = llama_space()
    window = space.window(blocks, 0.5)
    settings = LevelSettings(generations=5)
    runs = [levels(space, Toy(space, noise=0.1), blocks, window, seed=s, settings=settings) for s in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].subnetwork != runs[2].subnetwork


def test_scores_without_windows_and_nan_are_fine() -> None:
    space = tiny_space()
    window = space.window(blocks, 0.6, slack=0.05)

    class Plain(Toy):
        def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Any:
            return [math.nan if sub.layers[1].mlp == 0 else self.truth(sub) for sub in subs]

    found = levels(space, Plain(space), blocks, window, settings=LevelSettings(generations=20))
    assert found.subnetwork.layers[1].mlp > 0
    assert math.isfinite(found.score.value)


# ------------------------------------------------------------------------------------------------------ the record


def search_in(path: Path | None, toy: Toy, n_workers: int = 1, seed: int = 0) -> tuple[Found, Record]:
    space = toy.space
    record = Record.open(path, space, costs={"parameters": blocks}, belongs_to={"model": "toy"}, n_workers=n_workers)
    settings = LevelSettings(generations=6, offspring=8)
    window = space.window(blocks, 0.5)
    return levels(space, toy, blocks, window, seed=seed, record=record, settings=settings), record


class Killed(Toy):
    """Dies after some evaluations, as if by kill -9 (or by an exception)."""

    last = 10
    hard = False

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[Sequence[float]]:
        for sub, score in zip(subs, super().__call__(subs, draw, rung), strict=True):
            if self.n_calls > self.last:
                if self.hard:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            assert sub is not None
            yield score


def _die(path: Path) -> None:
    toy = Killed(llama_space(), noise=0.1)
    toy.hard = True
    search_in(path, toy)


@pytest.mark.parametrize("last", [0, 1, 17, 40])
def test_an_interrupted_search_resumes_to_the_same_answer(tmp_path: Path, last: int) -> None:
    whole, record = search_in(None, Toy(llama_space(), noise=0.1))
    toy = Killed(llama_space(), noise=0.1)
    toy.last = last
    with pytest.raises(KeyboardInterrupt):
        search_in(tmp_path / "trials.journal", toy)
    again = Toy(llama_space(), noise=0.1)
    found, resumed = search_in(tmp_path / "trials.journal", again)
    assert found == whole
    assert again.n_calls == whole.n_evaluations - last  # nothing but the interrupted candidate is computed twice
    assert [t.subnetwork for t in resumed.trials()] == [t.subnetwork for t in record.trials()]
    assert resumed.n_tokens == whole.n_tokens
    replay = Toy(llama_space(), noise=0.1)
    assert search_in(tmp_path / "trials.journal", replay)[0] == whole
    assert replay.n_calls == 0


def test_kill_9_loses_one_candidate(tmp_path: Path) -> None:
    path = tmp_path / "trials.journal"
    process = multiprocessing.get_context("fork").Process(target=_die, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    again = Toy(llama_space(), noise=0.1)
    found, _ = search_in(path, again)
    whole, _ = search_in(None, Toy(llama_space(), noise=0.1))
    assert found == whole
    assert again.n_calls == whole.n_evaluations - Killed.last


def _share_work(path: Path, out: Path) -> None:
    class Slow(Toy):
        def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[Sequence[float]]:
            for score in super().__call__(subs, draw, rung):
                time.sleep(0.005)
                yield score

    toy = Slow(llama_space(), noise=0.1)
    found, _ = search_in(path, toy, n_workers=2)
    out.write_text(f"{toy.n_calls} {found.subnetwork.to_json()}")


def test_two_processes_share_one_journal(tmp_path: Path) -> None:
    path, outs = tmp_path / "trials.journal", [tmp_path / "a", tmp_path / "b"]
    search_in(path, Toy(llama_space(), noise=0.1), seed=9)  # the study exists, as when a search is continued
    before = len(Record.open(path, llama_space(), costs={"parameters": blocks}, belongs_to={"model": "toy"}).trials())
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_share_work, args=(path, out)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    whole, _ = search_in(None, Toy(llama_space(), noise=0.1))
    counts = []
    for out in outs:
        n, _, text = out.read_text().partition(" ")
        assert SubNetwork.from_json(text) == whole.subnetwork
        counts.append(int(n))
    assert min(counts) > 0.15 * whole.n_evaluations  # both worked
    record = Record.open(path, llama_space(), costs={"parameters": blocks}, belongs_to={"model": "toy"})
    keys = [(t.subnetwork.key(), t.draw, t.rung) for t in record.trials()]
    assert len(keys) == len(set(keys))
    assert sum(counts) == len(keys) - before  # nothing was computed twice


def test_trials_are_ordinary_optuna_trials(tmp_path: Path) -> None:
    found, record = search_in(tmp_path / "trials.journal", Toy(llama_space(), noise=0.1))
    [name] = optuna.get_all_study_names(record.study._storage)
    assert name == "kl_nats"
    trials = record.trials()
    assert len(trials) == found.n_evaluations
    assert sum(t.n_tokens for t in trials) == found.n_tokens == record.n_tokens
    for trial, stored in zip(trials, record.study.trials, strict=True):
        assert stored.params == params(trial.subnetwork)
        assert stored.params["L03.mlp"] == trial.subnetwork.layers[3].mlp
        assert stored.values == [trial.value, blocks(trial.subnetwork)] == [trial.value, trial.cost["parameters"]]
        assert trial.value == pytest.approx(np.mean(trial.windows))
        assert trial.method == "levels"
        assert trial.seconds >= 0
    assert len(record.study.best_trials) >= 1
    guide = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    guide.add_trials(record.study.trials)  # another sampler can stand on our trials
    assert guide.ask(record.study.trials[0].distributions).params.keys() == stored.params.keys()


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    path, space = tmp_path / "trials.journal", llama_space()
    Record.open(path, space, belongs_to={"model": "a", "tokens": "x"})
    Record.open(path, space, belongs_to={"model": "a", "tokens": "x"})
    with pytest.raises(UserError, match=r"another model \(a, now b\)"):
        Record.open(path, space, belongs_to={"model": "b", "tokens": "x"})
    with pytest.raises(UserError, match="another space"):
        Record.open(path, llama_space(mlp_step=16), belongs_to={"model": "a", "tokens": "x"})
    Record.open(path, space, objective="nll_nats", belongs_to={"model": "a"})  # a study of its own


def test_an_unfinished_last_line_is_cut(tmp_path: Path) -> None:
    path, space = tmp_path / "trials.journal", llama_space()
    Record.open(path, space, belongs_to={"model": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"work')
    Record.open(path, space, belongs_to={"model": "a"})
    assert path.read_bytes().startswith(whole)
    assert b"work\n" not in path.read_bytes()


# ------------------------------------------------------------------------------------------------------ fronts


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


# ------------------------------------------------------------------------------------------------------ Shen


def test_mask_mutation_keeps_counts_and_overlap() -> None:
    rng, settings = random.Random(0), ShenSettings()
    for _ in range(300):
        n = rng.choice([1, 2, 3, 8, 100])
        old = tuple(sorted(rng.sample(range(n), rng.randint(0, n))))
        size = rng.randint(0, n)
        new = mutate_mask(old, size, n, 1.0, settings, rng)
        assert len(new) == len(set(new)) == size
        assert new == tuple(sorted(new))
        assert all(0 <= unit < n for unit in new)
        overlap = math.ceil(0.8 * min(len(old), size) - 1e-9)
        assert len(set(old) & set(new)) >= overlap
        can_differ = 0 < size < n and overlap < size
        assert not (len(old) == size and can_differ and new == old)


def test_mask_mutation_has_its_probability() -> None:
    rng, old = random.Random(0), tuple(range(60))
    changed = sum(mutate_mask(old, 60, 100, 0.3, ShenSettings(), rng) != old for _ in range(2000))
    assert 0.26 < changed / 2000 < 0.34
    assert len(mutate_mask(old, 50, 100, 0.0, ShenSettings(), rng)) == 50  # another ratio always needs another mask


def test_the_printed_algorithm_hardly_ever_succeeds_below_its_threshold() -> None:
    """Why the repair: at a ratio of .8 and less the literal rejection gives the old mask back, at .95 it works."""
    rng, literal = random.Random(0), ShenSettings(mask="literal", tries=50)
    low, high = tuple(range(1600)), tuple(range(1900))
    assert all(mutate_mask(low, 1600, 2000, 1.0, literal, rng) == low for _ in range(5))
    assert len(mutate_mask(low, 1500, 2000, 1.0, literal, rng)) == 1600  # and even has the wrong size
    new = mutate_mask(high, 1900, 2000, 1.0, literal, rng)
    assert new != high
    assert len(new) == 1900


def test_table_1() -> None:
    assert ranges_of(0.8, 32).attention == 0.8
    assert ranges_of(0.7, 32).attention == 0.7  # printed as .3
    assert ranges_of(0.5, 32).depth == (28, 32)
    assert ranges_of(0.5, 30).depth == (27, 30)
    assert ranges_of(0.9, 30).depth == (30, 30)
    assert ranges_of(0.55, 12).mlp == 0.1
    assert set(RANGES) == {0.9, 0.8, 0.7, 0.6, 0.5}


@pytest.mark.parametrize("target", [0.9, 0.7, 0.6])
@pytest.mark.parametrize("attention", ["grid", "groups", "none"])
def test_shen_meets_the_constraint_and_improves(target: float, attention: Any) -> None:
    space = llama_space(attention=attention)
    toy = Toy(space, pairs=0.3)
    window = space.window(blocks, target, slack=0.02)
    record = Record.open(None, space, costs={"parameters": blocks})
    settings = ShenSettings(population=20, mutants=10, crossovers=6, parents=4, generations=6)
    found = shen(space, toy, blocks, window, target=target, record=record, settings=settings)
    trials = record.trials()
    assert all(window[0] <= t.cost["parameters"] <= window[1] for t in trials)
    assert all(t.draw == 0 and t.rung == 0 and t.method == "shen" for t in trials)
    assert all(space.contains(t.subnetwork) for t in trials)
    assert any(t.subnetwork.kept for t in trials)  # masks are not only prefixes
    assert not found.start.kept  # the initial network keeps the most important units
    assert len({s.mlp for s in found.start.layers}) <= 3  # in the same ratio everywhere, up to settling
    assert toy.truth(found.subnetwork) < toy.truth(found.start)
    assert found.n_evaluations <= 1 + 20 * 6
    assert found.score.value == min(t.value for t in trials)


def test_shen_drops_layers_at_low_ratios() -> None:
    space = llama_space(depth=True)
    big = SearchSpace((space.attention[0], *(space.attention[1],) * 11), (space.mlp[1],) * 12, (48,))
    toy = Toy(big)
    window = big.window(blocks, 0.5, slack=0.02)
    record = Record.open(None, big)
    settings = ShenSettings(population=30, mutants=20, crossovers=6, generations=4, depth_probability=0.5)
    order = [0, 11, *range(1, 11)]
    shen(big, toy, blocks, window, target=0.5, layer_order=order, record=record, settings=settings)
    gone = {tuple(set(range(12)) - set(t.subnetwork.alive)) for t in record.trials()}
    assert () in gone
    assert len(gone) > 1
    for layers in gone:  # always the last ones of the order
        assert set(layers) == set(order[12 - len(layers) :])
        assert len(layers) <= 4
    for trial in record.trials():
        for layer in (trial.subnetwork.layers[i] for i in trial.subnetwork.alive):
            assert layer.attends
            assert layer.mlp


def test_shen_has_the_published_numbers() -> None:
    space = tiny_space()
    record = Record.open(None, space)
    s = ShenSettings(generations=3)
    shen(space, Toy(space), blocks, space.window(blocks, 0.7, slack=0.2), target=0.7, record=record, settings=s)
    assert ShenSettings().generations == 50
    assert (s.population, s.mutants, s.crossovers, s.parents) == (100, 50, 30, 10)
    assert (s.ratio_probability_initial, s.mask_probability_initial) == (0.3, 0.6)
    assert (s.ratio_probability, s.mask_probability, s.depth_probability) == (0.1, 0.3, 0.1)
    assert (s.similarity, s.tries) == (0.8, 1000)
    assert ShenSettings.sized(100, 50) == ShenSettings()
    with pytest.raises(UserError, match="cannot hold"):
        ShenSettings(population=8)
    with pytest.raises(UserError, match="per-layer"):
        shen(llama_space(uniform=True), Toy(space), blocks, (0, 1), target=0.7)


def test_curves_by_width_become_curves_by_gene() -> None:
    space = llama_space()
    attention = np.arange(4 * 5 * 3).reshape(4, 5, 3)
    mlp = np.arange(4 * 81).reshape(4, 81)
    curves = gene_errors(space, attention, mlp)
    assert len(curves) == 8
    assert curves[2].tolist() == [attention[1, kv, q] for kv, q in space.attention[1]]
    assert curves[3].tolist() == [mlp[1, w] for w in space.mlp[1]]
    sub = SubNetwork(48, (LayerShape(4, 2, 80), LayerShape(1, 2, 8), LayerShape(0, 0, 0), LayerShape(2, 1, 40)))
    expected = attention[0, 4, 2] + mlp[0, 80] + attention[1, 1, 2] + mlp[1, 8] + attention[2, 0, 0] + mlp[2, 0]
    assert predictor(space, curves)(sub) == expected + attention[3, 2, 1] + mlp[3, 40]
