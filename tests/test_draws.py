"""Spaces that all layers share are the paper's; bins cure the skew of sizes; empty ones are told."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hurry import painted
from tiny import CONFIGS, tiny
from transformers import LlamaConfig

from prunus.errors import UserError
from prunus.models import costs
from prunus.models.families import family_of, full
from prunus.models.slicing import check_subnetwork, extract
from prunus.recording import pictures
from prunus.searching.grids import NAMES, Grid, along, cuts_hidden, grid_of
from prunus.subnetwork import SubNetwork
from prunus.training import draws


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
    if strategy == "sandwich":
        assert all(step[-1] == space.smallest() for step in found)
    assert found == [list(draw(random.Random(seed))) for seed in range(20)]


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
