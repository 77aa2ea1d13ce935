"""Spaces that all layers share are the paper's; bins cure the skew of sizes; empty ones are told."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hurry import painted
from tiny import CONFIGS, tiny
from transformers import LlamaConfig

from prunus.config import resolve
from prunus.errors import UserError
from prunus.models import costs
from prunus.models.families import family_of, full
from prunus.models.slicing import check_subnetwork, extract
from prunus.recording import pictures
from prunus.searching.grids import NAMES, Grid, along, cuts_hidden, grid_of, searchable
from prunus.subnetwork import SubNetwork
from prunus.training import draws
from prunus.training.learning import TrainConfig


def big() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip


def test_the_joint_space_of_llama_3_is_the_papers() -> None:
    space = grid_of(big(), "llama_joint")
    assert isinstance(space, Grid)
    assert space.hidden == (4096, 2048, 1024, 512, 256, 128, 64, 32)
    assert [kv * q for kv, q in space.heads] == [32, 16, 8]
    assert space.mlp == (3.5, 3.0, 2.0, 1.0)
    assert space.depths == tuple(range(32, 0, -1))
    assert 10**space.size == pytest.approx(8 * 3 * 4 * 32)
    half = space.build((1, 1, 2, 16))
    assert half.hidden == 2048
    assert {(s.kv_heads, s.q_per_kv, s.mlp) for s in half.layers} == {(8, 2, 4096), (0, 0, 0)}
    assert len(half.alive) == 16


POWERS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
EIGHTS = ((8, 4), (8, 3), (8, 2), (8, 1))  # 32, 24, 16, 8 heads: with all KV groups no other number can be


@pytest.mark.parametrize(
    ("name", "hidden", "heads", "mlp", "ratio"),
    [
        ("small", range(4096, 63, -1), EIGHTS, range(14336, 0, -1), False),
        ("medium", range(4096, 63, -1), EIGHTS, range(14336, 0, -1), False),
        ("hw_gpt_bench", range(4096, 0, -1), EIGHTS, (4, 3, 2, 1), True),
        ("llama", range(4096, 0, -1), ((8, 4),), (3, 2, 1), True),
        ("llama2", range(4096, 63, -1), ((8, 4),), (3.5, 3, 2, 1), True),
        ("llama_heads", POWERS, ((8, 4), (8, 2), (8, 1)), (3.5, 3, 2, 1), True),
        ("llama_joint", POWERS, ((8, 4), (8, 2), (8, 1)), (3.5, 3, 2, 1), True),
    ],
)
def test_spaces_of_llama_3_are_the_papers(name: Any, hidden: Any, heads: Any, mlp: Any, ratio: bool) -> None:
    """Their search_spaces.py, for 32 layers of 4096 channels, 14336 neurons, 32 heads in 8 groups."""
    space = grid_of(big(), name)
    assert isinstance(space, Grid)
    assert (space.hidden, space.heads, space.mlp) == (tuple(hidden), heads, tuple(mlp))
    assert space.depths == tuple(range(32, 0, -1))
    assert (space.ratio, space.own, space.log_hidden) == (ratio, name == "medium", hidden is not POWERS)
    assert space.largest() == full(big())
    if name == "llama":  # whose ratios stop below the model's own
        assert searchable(space, big()).largest() == full(big())
    rng = random.Random(0)
    for sub in (space.sample(rng) for _ in range(50)):
        assert sub.hidden in hidden
        for shape in (sub.layers[i] for i in sub.alive):
            assert shape.mlp in ([min(14336, int(r * sub.hidden)) for r in mlp] if ratio else mlp)
    below = sum(space.sample(rng).hidden <= 512 for _ in range(2000)) / 2000  # as probable as its logarithm is long
    least = space.hidden[-1]
    wanted = 5 / 8 if hidden is POWERS else math.log(512.5 / least) / math.log(4096 / least)
    assert below == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(
    ("hidden", "neurons", "ratios"),
    [(4096, 11008, (2.6875, 2.5, 2, 1)), (5120, 13824, (2.7, 2.5, 2, 1)), (3072, 8192, (8192 / 3072, 2.5, 2, 1))],
)
def test_ratios_of_other_models_are_the_papers(hidden: int, neurons: int, ratios: tuple[float, ...]) -> None:
    """Llama-2 7B, 13B, and Phi-3, all with a KV group for each head."""
    config = LlamaConfig(hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=2, num_attention_heads=32)
    space = grid_of(config, "llama2")
    assert isinstance(space, Grid)
    assert space.mlp == ratios
    assert space.heads == ((32, 1),)
    joint = grid_of(config, "llama_joint")
    assert isinstance(joint, Grid)
    assert joint.heads == ((32, 1), (16, 1), (8, 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_linear_grid_is_linear_in_the_widths(name: Any) -> None:
    space = grid_of(big(), name)
    steps = [along(space, k / 21) for k in range(22)]
    assert (steps[0], steps[-1]) == (space.smallest(), space.largest())
    for unit in ("kv_heads", "q_per_kv", "mlp"):
        of_first = [getattr(sub.layers[0], unit) for sub in steps]
        assert of_first == sorted(of_first)
    assert [len(sub.alive) for sub in steps] == sorted(len(sub.alive) for sub in steps)
    assert [sub.hidden for sub in steps] == sorted(sub.hidden for sub in steps)
    half = along(space, 0.5)
    if name in ("groups", "layers", "small", "medium"):
        assert half.layers[0].mlp == pytest.approx(14336 / 2, abs=32)
    if name == "groups":
        assert (half.layers[0].kv_heads, half.layers[0].q_per_kv) in ((5, 3), (4, 2), (5, 2), (4, 3))
        assert len(half.alive) == 17
    if name == "llama_joint":
        assert (half.hidden, half.layers[0].q_per_kv, half.layers[0].mlp) == (2048, 2, 2 * 2048)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_space_holds_the_full_network_and_legal_ones_only(name: str, family: str) -> None:
    config = CONFIGS[family]()
    space = grid_of(config, name, mlp_step=16)  # type: ignore[arg-type]
    assert space.largest() == full(config)
    rng = random.Random(0)
    for sub in [space.smallest(), *(space.sample(rng) for _ in range(20)), *(along(space, k / 4) for k in range(5))]:
        check_subnetwork(config, sub)
    assert along(space, 1) == space.largest()
    assert along(space, 0) == space.smallest()
    assert cuts_hidden(space) == (name not in ("groups", "layers"))


def test_the_least_important_layers_leave_first() -> None:
    space = grid_of(CONFIGS["llama"](), "llama_joint", layer_order=[3, 0, 2, 1])
    kept = [sub.alive for sub in (space.build((0, 0, 0, level)) for level in range(4))]
    assert kept == [(0, 1, 2, 3), (0, 2, 3), (0, 3), (0,)]  # layer 0 always stays


def test_an_unknown_space_is_refused() -> None:
    with pytest.raises(UserError, match="known are llama_joint"):
        grid_of(CONFIGS["llama"](), "lama")  # type: ignore[arg-type]


def cost_of(name: str = "llama"):  # type: ignore[no-untyped-def]
    model = tiny(name)
    layout = costs.layout(model, family_of(model.config))
    return model, lambda sub: float(costs.parameters(layout, sub, "all"))


@pytest.mark.parametrize("name", NAMES)
def test_bins_hold_networks_of_their_size_and_the_best_is_chosen(name: str) -> None:
    model, cost = cost_of()
    space = grid_of(model.config, name, mlp_step=8)  # type: ignore[arg-type]
    found = draws.pool_of(
        space, cost, "calibrated-ppl", bins=6, draws=4, seed=1, score=lambda sub: -sub.hidden + cost(sub)
    )
    assert space.smallest() in found.networks
    assert space.largest() in found.networks
    for one in found.bins:
        assert len(set(one.candidates)) == len(one.candidates) <= 4
        for sub in one.candidates:
            assert one.low <= cost(sub) < one.high or sub == space.largest()
        if one.candidates:
            assert one.chosen == min(one.candidates, key=lambda sub: -sub.hidden + cost(sub))
    assert found == draws.pool_of(
        space, cost, "calibrated-ppl", bins=6, draws=4, seed=1, score=lambda sub: -sub.hidden + cost(sub)
    )


def test_bins_begin_at_the_least_size_that_is_asked_for() -> None:
    config = CONFIGS["llama"]()
    model, space = tiny("llama"), grid_of(config, "groups")
    layout = costs.layout(model, family_of(config))

    def size(sub: SubNetwork) -> float:
        return float(costs.parameters(layout, sub, "all"))

    least = 0.6 * size(space.largest())
    assert size(space.smallest()) < least
    pool = draws.pool_of(space, size, "grid-params", bins=4, least=least)
    sizes = [size(sub) for sub in pool.networks]
    assert sizes == sorted(sizes)
    assert sizes[0] >= least
    assert pool.networks[-1] == space.largest()
    assert pool.bins[0].low == least
    draw = draws.draw_of(space, pool, "sandwich", 1)
    assert draw(random.Random(0))[-1] == pool.networks[0]
    all_sizes = draws.pool_of(space, size, "grid-params", bins=4)
    assert all_sizes.networks[0] == space.smallest()


def test_bins_cure_the_skew_of_sizes() -> None:
    """Of uniform draws of Llama-3.1-8B's joint space two thirds are in the lowest of 21 bins; of a binned pool, few."""
    space, d = grid_of(big(), "llama_joint"), 4096

    def cost(sub: SubNetwork) -> float:
        inner = sum(
            sub.hidden * 128 * (2 * s.kv_heads * s.q_per_kv + 2 * s.kv_heads) + 3 * sub.hidden * s.mlp
            for s in sub.layers
        )
        return float(2 * 128256 * sub.hidden + inner)

    assert cost(space.largest()) == pytest.approx(8.03e9, rel=0.001)
    assert d == space.hidden[0]
    skewed = draws.histogram(space, cost, None)
    assert 0.6 < skewed[0] / sum(skewed) < 0.75
    pool = draws.pool_of(space, cost, "grid-params", bins=21)
    cured = draws.histogram(space, cost, pool)
    assert max(cured) / sum(cured) < 0.2
    assert sum(count > 0 for count in cured) >= 21 - len(pool.empty)


def test_bins_that_stay_empty_are_told_and_no_network_at_all_is_refused() -> None:
    model, cost = cost_of()
    space = grid_of(model.config, "llama_joint")
    found = draws.pool_of(space, cost, "grid-params", bins=200, trials=1)
    assert 0 < len(found.empty) < 200
    assert all(high > low for low, high in found.empty)
    with pytest.raises(UserError, match="have one size"):
        draws.pool_of(space, lambda sub: 1.0, "grid-params")
    with pytest.raises(UserError, match="none of 2 draws but the full network fell into a bin"):
        draws.pool_of(space, cost, "grid-params", bins=2, trials=1, least=0.999 * cost(space.largest()))


def test_magnitude_is_the_sum_of_absolute_weights() -> None:
    model, _ = cost_of("qwen2")
    family, sub = family_of(model.config), along(grid_of(model.config, "llama_joint"), 0.5)
    small = extract(model, family, sub)
    wanted = sum(float(p.detach().abs().sum()) for p in small.parameters())
    assert draws.magnitude(model, family)(sub) == pytest.approx(-wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "n", "ends"),
    [("standard", 1, (True, True)), ("random", 1, None), ("sandwich", 5, (True, False)), ("sandwich-grid", 4, None)],
)
def test_strategies_draw_what_they_say(strategy: str, n: int, ends: tuple[bool, bool] | None) -> None:
    model, cost = cost_of()
    space = grid_of(model.config, "llama_joint")
    pool = draws.pool_of(space, cost, "grid", bins=5)
    draw = draws.draw_of(space, pool, strategy, 3)  # type: ignore[arg-type]
    found = [list(draw(random.Random(seed))) for seed in range(20)]
    assert all(len(step) == n for step in found)
    assert all(sub is None or sub in pool.networks for step in found for sub in step)
    if strategy.startswith("sandwich"):
        assert all(step[0] is None for step in found)
        assert all(sub is not None for step in found for sub in step[1:])  # the full network is trained once
    else:
        assert any(None in step for step in found)
    if strategy == "sandwich":
        assert all(step[-1] == space.smallest() for step in found)
    assert found == [list(draw(random.Random(seed))) for seed in range(20)]


@pytest.mark.parametrize("strategy", ["sandwich", "sandwich-grid"])
def test_a_sandwich_has_more_than_the_full_network(strategy: Any) -> None:
    """Draws from the space are of other networks too; a pool of the full one alone is refused."""
    config = CONFIGS["llama"]()
    space = grid_of(config, "llama_joint")
    assert isinstance(space, Grid)
    few = replace(space, hidden=(48,), heads=((4, 2),), depths=(4,))
    draw = draws.draw_of(few, draws.Pool(()), strategy, 2)
    assert all(None not in draw(random.Random(seed))[1:] for seed in range(20))
    for pool, space in ((draws.Pool((few.largest(),)), few), (draws.Pool(()), replace(few, mlp=few.mlp[:1]))):
        with pytest.raises(UserError, match="nothing but the full network"):
            draws.draw_of(space, pool, strategy, 2)
        assert list(draws.draw_of(space, pool, "random", 2)(random.Random(0))) == [None]


def test_their_code_draws_three_beside_the_full_network() -> None:
    assert TrainConfig().n_drawn == 2
    assert TrainConfig(strategy="sandwich-grid").n_drawn == 3
    assert TrainConfig(strategy="sandwich-grid", drawn=2).n_drawn == 2
    assert resolve(None, {"model": "m", "train.strategy": "sandwich-grid"}).train.n_drawn == 3
    assert TrainConfig().drawn is None  # so that a run that changes its strategy draws as many as that one does


@pytest.mark.parametrize("sampler", ["grid-params", "random"])
def test_the_picture_of_sizes_shows_real_draws(sampler: str, tmp_path: Path) -> None:
    """Its bars are the histogram of what is drawn, and show the skew of uniform draws and what bins make of it."""
    model, cost = cost_of()
    space = grid_of(model.config, "llama_joint")
    least, most = cost(space.smallest()), cost(space.largest())
    pool = draws.pool_of(space, cost, sampler, bins=8)  # type: ignore[arg-type]
    drawn = {"uniform draws": draws.histogram(space, cost, None, bins=8)}
    if pool.networks:
        drawn[sampler] = draws.histogram(space, cost, pool, bins=8)
    figure = pictures.sizes(drawn, least, most)
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(drawn)
    highest = []
    for ax, counts in zip(figure.axes, drawn.values(), strict=True):
        bars = sorted(ax.patches, key=lambda bar: bar.get_x())
        assert [bar.get_height() for bar in bars] == pytest.approx([100 * n / 2000 for n in counts])
        assert bars[0].get_x() == pytest.approx(least / 1e6)
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(most / 1e6)
        highest.append(max(bar.get_height() for bar in bars))
    rng = random.Random("histogram 0")
    small = sum(cost(space.sample(rng)) < least + (most - least) / 8 for _ in range(2000))
    assert drawn["uniform draws"][0] == small
    if sampler == "grid-params":
        assert highest[0] > 1.4 * highest[1]
    with painted():
        assert all(path.stat().st_size > 5000 for path in pictures.save(figure, tmp_path / "sizes"))
