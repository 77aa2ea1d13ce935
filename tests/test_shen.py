"""Shen et al.'s evolution: masks keep their counts, table 1 and the published numbers hold, the constraint is met; the
whole method on a tiny model, beside random networks."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from toy import Toy, blocks, llama_space, tiny_space

from prunus.baselines import random_search, rivals, shen_search
from prunus.baselines.subject import Subject
from prunus.baselines.table import TABLE
from prunus.config import resolve
from prunus.errors import UserError
from prunus.models import costs
from prunus.progress import silent
from prunus.searching.objective import Divergence, no_weights
from prunus.searching.shen import RANGES, ShenSettings, mutate_mask, ranges_of, shen
from prunus.searching.space import SearchSpace
from prunus.searching.study import Record
from prunus.subnetwork import SubNetwork


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


@pytest.mark.parametrize(("target", "heads", "step"), [(0.8, {8}, 24), (0.7, {8, 6}, 16), (0.5, {8, 6}, 16)])
def test_ratios_are_rounded_into_the_ranges_of_table_1(target: float, heads: set[int], step: int) -> None:
    """Of 8 heads in pairs, a ratio of .8 is nearest to 6 (.75) and .6 to 4 (.5), both outside their ranges.

    So is an MLP of 24 in steps of 24, nearest to .4 of 80; and at 50 % the same ratio everywhere, for attention.
    """
    space = llama_space(mlp_step=step)
    record = Record.open(None, space)
    settings = ShenSettings(
        20, 10, 6, 4, generations=5, ratio_probability_initial=0.9, ratio_probability=0.9, depth_probability=0.0
    )
    window = space.window(blocks, target, slack=0.1)
    found = shen(space, Toy(space), blocks, window, target=target, record=record, settings=settings)
    layers = [layer for t in record.trials() for layer in t.subnetwork.layers]
    assert {layer.kv_heads * layer.q_per_kv for layer in layers} <= heads
    assert {layer.kv_heads * layer.q_per_kv for layer in found.start.layers} <= heads
    assert min(layer.mlp for layer in layers) >= ranges_of(target, 4).mlp * 80


def test_a_target_that_no_network_inside_the_ranges_meets_leaves_them() -> None:
    space = llama_space()
    record = Record.open(None, space)
    window = space.window(blocks, 0.25, slack=0.05)
    settings = ShenSettings(20, 10, 6, 4, generations=3)
    found = shen(space, Toy(space), blocks, window, target=0.25, record=record, settings=settings)
    assert all(window[0] <= blocks(t.subnetwork) <= window[1] for t in record.trials())
    assert (
        max(s.kv_heads * s.q_per_kv for s in found.start.layers) < 0.6 * 8
    )  # one ratio for all, not a few cut to bits


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


# ---------------------------------------------------------------------------------------- the method, and its control


def subject(**given: Any) -> Subject:
    return Subject(tiny("llama"), tokens(6, 32), **{"search_tokens": 32 * 12, **given})


def test_shen_and_random_spend_what_they_may() -> None:
    s = subject(search_tokens=32 * 40)
    shen = s.run(lambda: TABLE["shen"].run(s, 0.7))
    random = s.run(lambda: TABLE["random"].run(s, 0.7))
    for outcome, spent in (shen, random):
        kept = costs.parameters(s.layout, outcome.sub) / s.blocks
        assert 0.69 < kept <= 0.7
        assert spent.forward_tokens < 32 * 45 + 3 * s.ids.numel()
    assert "4 generations of 10" in shen[0].notes[0]
    assert int(shen[0].notes[0].split()[0]) <= 41
    assert "40 candidates" in random[0].notes


def test_shen_divides_its_budget_among_the_generations_that_were_asked_for() -> None:
    """24 candidates: 2 generations of 10 at most; 5,000 are the published 50 of 100, one window each."""
    for asked, found in ((1, "1 generations of 24"), (2, "2 generations of 12"), (50, "2 generations of 10")):
        note = TABLE["shen"].run(subject(search_tokens=32 * 24, generations=asked), 0.7).notes[0]
        assert note.endswith(f", {found}")
    published = subject(search_tokens=32 * 5000, generations=50)
    assert shen_search.evolution(published) == shen_search.shen.ShenSettings()
    config = resolve(None, {"model": "any", "rival.generations": "7"})
    assert rivals.subject_of(config, published.model, published.ids, silent).generations == 7
    with pytest.raises(UserError, match="generations"):
        resolve(None, {"model": "any", "rival.generations": 0})


def test_the_best_of_random_networks_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve a judge who looks at nothing likes the seventh and the tenth best: the first of the two wins."""
    seen: list[SubNetwork] = []

    class Judge:
        forward_tokens = 0.0

        def measure(self, subs: list[SubNetwork], windows: list[int]) -> list[list[float]]:
            seen.extend(subs)
            return [[1.0 if i in (6, 9) else 3.0 - i / 100] for i in range(len(subs))]

    monkeypatch.setattr(random_search, "judge_of", lambda *_: Judge())
    outcome = TABLE["random"].run(subject(), 0.7)
    assert len(seen) == 12 and seen[6] not in (*seen[:6], *seen[7:])
    assert outcome.sub == seen[6]
    assert outcome.notes == ("12 candidates",)


def test_random_differs_from_shen_in_its_networks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both: the same window for the judge, as many candidates, and one reformation by 30 iterations of ADMM."""
    s = subject(window=16, search_tokens=16 * 30)
    judged: list[tuple[Any, ...]] = []
    reformed: list[tuple[Any, ...]] = []
    measure, reform = Divergence._measure, shen_search.reformed

    def counted(self: Divergence, subs: Any, windows: Any, holdout: bool) -> Any:
        judged.append((len(subs), list(windows), self.pool, self.kind, self.stride, self.weights))
        return measure(self, subs, windows, holdout)

    def kept(subject: Subject, model: Any, orders: Any, sub: SubNetwork, iterations: int = 30) -> Any:
        network = reform(subject, model, orders, sub, iterations)
        reformed.append((iterations, network, shen_search.extract(model, subject.family, sub)))
        return network

    monkeypatch.setattr(Divergence, "_measure", counted)
    for module in (shen_search, random_search):
        monkeypatch.setattr(module, "reformed", kept)
    candidates = {}
    for name in ("shen", "random"):
        outcome = TABLE[name].run(s, 0.6)
        candidates[name] = sum(n for n, *_ in judged)
        for _, windows, pool, *how in judged:
            assert windows == [0] and torch.equal(pool, s.judged()[:1]) and how == ["ppl", 1, no_weights], name
        [(iterations, network, plain)] = reformed
        assert iterations == 30 and outcome.model is network, name
        assert divergence(s, network) < divergence(s, plain), name
        judged.clear()
        reformed.clear()
    assert candidates["random"] == shen_search.evaluations(s) == 30
    assert 20 < candidates["shen"] <= 31  # parents are not judged twice


def divergence(s: Subject, model: Any) -> float:
    """KL(dense || model) on the calibration tokens, nats."""
    with torch.no_grad():
        dense, other = (m(s.ids, use_cache=False).logits.log_softmax(-1) for m in (s.model, model))
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def test_shen_reforms_its_winner_by_admm() -> None:
    s = subject()
    plain = shen_search.compress(s, 0.6, iterations=0)
    reformed = shen_search.compress(s, 0.6)
    assert plain.sub == reformed.sub
    far = [divergence(s, m) for m in (plain.model, reformed.model)]
    assert far[1] < far[0]
    assert math.isfinite(far[0])
