"""Laws of the searches, on objectives whose best answer is known: no model, no tokens."""

from __future__ import annotations

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
from toy import Toy, blocks, brute_force, llama_space, tiny_space

from prunus.errors import UserError
from prunus.searching.allocate import allocate
from prunus.searching.moves import Prices, fit, gene_errors, mutate, predictor, scatter, settle
from prunus.searching.search import Found, LevelSettings, LocalSettings, levels, local, random_search, sampled
from prunus.searching.space import SearchSpace, space_of
from prunus.searching.study import Record, params
from prunus.subnetwork import LayerShape, SubNetwork

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


def test_the_better_start_is_taken_and_says_what_is_guessed() -> None:
    space = llama_space()
    toy = Toy(space)
    window = space.window(blocks, 0.5)
    prices, spare = Prices(space, blocks), window[1] - blocks(space.smallest())
    good = space.build((*allocate(prices.tables(), toy.errors(), spare).levels, 0))
    misled = [errors[::-1].copy() for errors in toy.errors()]  # believes that what is dear is cheap
    bad = space.build((*allocate(prices.tables(), misled, spare).levels, 0))
    assert toy.truth(bad) > 1.1 * toy.truth(good)
    asked: list[SubNetwork] = []

    def guess(start: SubNetwork) -> Any:
        asked.append(start)
        return predictor(space, toy.errors())

    found = levels(space, toy, blocks, (0.0, window[1]), start=[bad, good], predict=guess)
    assert asked == [good] and found.start == good


def test_search_beats_its_start_and_its_random_control_at_equal_tokens() -> None:
    space, gains = llama_space(), []
    window = space.window(blocks, 0.5)
    prices = Prices(space, blocks)
    for seed in (0, 2):
        toy = Toy(space, seed, pairs=1.0, noise=0.05)
        answer = allocate(prices.tables(), toy.errors(), window[1] - blocks(space.smallest()))
        start, predict = space.build((*answer.levels, 0)), predictor(space, toy.errors())
        settings = LevelSettings(generations=100, patience=100, n_tokens=40_000, survivors=(4,))
        found = levels(
            space,
            toy,
            blocks,
            window,
            start=[start],
            predict=lambda _, guess=predict: guess,
            seed=seed,
            settings=settings,
        )
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


@pytest.mark.parametrize("method", ["tpe", "nsga2", "local"])
def test_searches_on_one_draw_improve_their_start_inside_the_window(method: str) -> None:
    space = tiny_space()
    toy, window = Toy(space, 1, pairs=1.0), space.window(blocks, 0.6, slack=0.03)
    answer = allocate(Prices(space, blocks).tables(), toy.errors(), window[1] - blocks(space.smallest()))
    start = space.build((*answer.levels, 0))
    found = alike(method, space, toy, window, generations=20 if method == "nsga2" else 15, start=[start])
    assert found.start == fit(Prices(space, blocks), start, window, random.Random(0))
    assert window[0] <= blocks(found.subnetwork) <= window[1]
    best, first = toy.truth(brute_force(space, toy, window)), toy.truth(found.start)
    assert best < 0.99 * first  # there is something to find
    assert toy.truth(found.subnetwork) <= best + 0.5 * (first - best)
    assert found.score.value <= found.start_score.value
    none = alike(method, space, toy, window, start=[start], generations=0)
    assert none.subnetwork == none.start == found.start


def alike(
    method: str, space: SearchSpace, toy: Toy, window: tuple[float, float], generations: int = 15, **given: Any
) -> Found:
    if method == "local":
        settings = LocalSettings(generations=generations, neighbours=10)
        return local(space, toy, blocks, window, settings=settings, **given)
    return sampled(space, toy, blocks, window, method, generations=generations, population=10, **given)  # type: ignore[arg-type]


def test_local_search_leaves_a_hole_by_starting_anew() -> None:
    """Without restarts it ends in the first network that no neighbour betters."""
    space = tiny_space()
    window, gains = space.window(blocks, 0.6, slack=0.03), 0
    for seed in (1, 2, 4):
        toy, ends = Toy(space, seed, pairs=3.0), []
        for patience in (2, 10**6):
            settings = LocalSettings(generations=20, neighbours=6, patience=patience)
            ends.append(toy.truth(local(space, toy, blocks, window, seed=seed, settings=settings).subnetwork))
        assert ends[0] <= ends[1]
        gains += ends[0] < 0.9 * ends[1]
    assert gains == 3


@pytest.mark.parametrize("method", ["tpe", "local"])
def test_what_only_fits_the_searchs_tokens_is_not_returned(method: str) -> None:
    """On one draw the best of many noisy scores is lucky: the start, which is the optimum, stays."""
    space = llama_space()
    toy, window = Toy(space, noise=2.0), space.window(blocks, 0.5)
    prices = Prices(space, blocks)
    start = space.build((*allocate(prices.tables(), toy.errors(), window[1] - blocks(space.smallest())).levels, 0))
    found = alike(method, space, toy, window, start=[start], generations=6)
    assert found.score.value <= found.start_score.value  # by held-out tokens
    assert found.subnetwork == found.start or toy.truth(found.subnetwork) < 1.2 * toy.truth(start)


@pytest.mark.parametrize("method", ["tpe", "nsga2", "local"])
def test_these_searches_resume_too(method: str, tmp_path: Path) -> None:
    space = llama_space()
    window = space.window(blocks, 0.5)

    def run(path: Path | None, toy: Toy) -> Found:
        record = Record.open(path, space, costs={"parameters": blocks})
        return alike(method, space, toy, window, generations=5, record=record)

    whole = run(None, Toy(space, noise=0.1))
    killed = Killed(space, noise=0.1)
    killed.last = 17
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "trials.journal", killed)
    again = Toy(space, noise=0.1)
    assert run(tmp_path / "trials.journal", again) == whole
    assert again.n_calls == whole.n_evaluations - 17


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
