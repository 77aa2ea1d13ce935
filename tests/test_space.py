"""Laws of the search space: every point is legal, levels and sub-networks are the same thing, reach is reachable."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import CONFIGS, tiny

from prunus.errors import UserError
from prunus.models.checkpoint import uniform_refusal
from prunus.models.families import dims, family_of, full
from prunus.searching.space import SearchSpace, space_of
from prunus.steps import _stock as stock
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

UNITS: list[Any] = ["grid", "groups", "none"]


def weights(sub: SubNetwork) -> float:
    return sub.hidden * sum(2 * s.kv_heads * s.q_per_kv * 8 + 2 * s.kv_heads * 8 + 3 * s.mlp for s in sub.layers)


@pytest.mark.parametrize("name", ["phi", "llama-mqa-tied-bias", "gemma2", "gpt2"])
def test_uniform_spaces_hold_what_a_stock_configuration_holds(name: str) -> None:
    model = tiny(name)
    family, whole = family_of(model.config), full(model.config)
    space = space_of(model.config, mlp_step=16, uniform=True, layer_order=range(4))
    found = stock(SimpleNamespace(model=model, family=family), space)
    assert (set(found.attention[0]) < set(space.attention[0])) is (name != "gemma2")  # which takes any number of heads
    assert found.largest() == whole
    for level in range(len(found.attention[0])):
        for depth in range(len(found.depths)):
            assert uniform_refusal(model.config, family, found.build([level, 1, depth, 0])) is None


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_sample_is_a_legal_sub_network(name: str, unit: Any, uniform: bool) -> None:
    config, rng = CONFIGS[name](), random.Random(0)
    d = dims(config)
    space = space_of(config, mlp_step=16, attention=unit, uniform=uniform, hidden=(48, 24))
    assert space.largest() == full(config)
    for _ in range(50):
        sub = space.sample(rng)
        assert space.contains(sub)
        assert space.build(space.levels(sub)) == sub
        assert space.snap(sub) == space.levels(sub)
        assert sub.layers[0].attends
        assert sub.hidden in (48, 24)
        assert not uniform or sub.uniform
        for shape in sub.layers:
            assert shape.mlp % 16 == 0 or shape.mlp == d["mlp"]
            assert 0 <= shape.kv_heads <= d["kv_heads"]
            assert 0 <= shape.q_per_kv <= d["q_per_kv"]
            assert (shape.kv_heads == 0) == (shape.q_per_kv == 0)
            if unit == "groups" and shape.attends:
                assert shape.q_per_kv == d["q_per_kv"]
            if unit == "none" and not uniform:
                assert (shape.kv_heads, shape.q_per_kv) == (d["kv_heads"], d["q_per_kv"])


def test_the_full_width_is_an_option_even_if_it_is_no_multiple() -> None:
    space = space_of(CONFIGS["llama"](), mlp_step=32)
    assert space.mlp[1] == (80, 64, 32, 0)
    assert space.attention[1][0] == (4, 2)
    assert space.attention[1][-1] == (0, 0)
    assert len(space.attention[1]) == 9
    assert len(space.attention[0]) == 8


def test_without_depth_nothing_is_dropped() -> None:
    space = space_of(CONFIGS["llama"](), mlp_step=32, depth=False)
    assert all(shape.attends and shape.mlp for shape in space.smallest().layers)


def test_size_counts_the_options() -> None:
    space = space_of(CONFIGS["llama"](), mlp_step=32, hidden=(48, 24))
    assert 10**space.size == pytest.approx(8 * 9**3 * 4**4 * 2)


def test_reach_and_window_name_the_range() -> None:
    space = space_of(CONFIGS["llama"](), mlp_step=16)
    least, most = space.reach(weights)
    rng = random.Random(0)
    assert all(least <= weights(space.sample(rng)) <= most for _ in range(100))
    lo, hi = space.window(weights, 0.5)
    assert hi == 0.5 * most
    assert lo == pytest.approx(0.995 * hi)
    assert space.window(weights, 1.0)[1] == most
    for keep in (0.001, 0.0, -1.0, 1.2):
        with pytest.raises(UserError, match=f"{least / most:.4g} to 1"):
            space.window(weights, keep)
    narrow = space_of(CONFIGS["llama"](), mlp_step=80, attention="none", depth=False)
    with pytest.raises(UserError, match="out of reach"):
        narrow.window(weights, 0.5, of=most)


def test_members_do_not_matter_for_membership() -> None:
    config = CONFIGS["llama"]()
    space = space_of(config, mlp_step=16)
    whole = full(config)
    named = SubNetwork(
        48, (LayerShape(4, 2, 64), *whole.layers[1:]), (LayerKept(mlp=tuple(range(16, 80))),) + (LayerKept(),) * 3
    )
    assert space.contains(named)
    assert not space.contains(SubNetwork(48, (LayerShape(4, 2, 63), *whole.layers[1:])))
    assert not space.contains(SubNetwork(47, whole.layers))
    assert not space.contains(SubNetwork(48, whole.layers[1:]))
    odd = SubNetwork(47, (LayerShape(4, 2, 65), *whole.layers[1:]))
    assert space.build(space.snap(odd)) == SubNetwork(48, (LayerShape(4, 2, 64), *whole.layers[1:]))


def test_uniform_spaces_drop_the_least_important_layers() -> None:
    space = space_of(CONFIGS["llama"](), mlp_step=40, uniform=True, layer_order=(3, 0, 2, 1))
    assert space.layer_order == (0, 3, 2, 1)
    sub = space.build([0, 1, 1, 0])
    assert sub.alive == (0, 2, 3)
    assert sub.layers[2] == LayerShape(4, 2, 40)
    other = SubNetwork(48, (sub.layers[0], sub.layers[0], sub.layers[1], sub.layers[0]))
    assert not space.contains(other)  # drops layer 2 instead of layer 1
    assert space.contains(space.build(space.snap(other)))


def test_neighbours_differ_in_one_gene_by_one_level() -> None:
    space = space_of(CONFIGS["llama"](), mlp_step=16, hidden=(48, 24))
    sub = space.sample(random.Random(3))
    levels = space.levels(sub)
    around = space.neighbours(sub)
    assert len(set(around)) == len(around) > len(space.genes)
    for other in around:
        assert sum(abs(a - b) for a, b in zip(levels, space.levels(other), strict=True)) == 1


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"mlp_step": 0}, "outside 1..80"),
        ({"mlp_step": 81}, "outside 1..80"),
        ({"attention": "rows"}, "grid, groups, whole or none"),
        ({"hidden": (64,)}, "1..48"),
        ({"uniform": True, "layer_order": (0, 1, 2)}, "each of the 4 layers"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        space_of(CONFIGS["llama"](), **given)


def test_spaces_have_names_of_their_own() -> None:
    config = CONFIGS["llama"]()
    keys = {space_of(config, mlp_step=s, attention=u).key() for s in (16, 32) for u in UNITS}
    assert len(keys) == 6
    assert SearchSpace(((((1, 1),),)), ((4, 0),), (8,)).key() == SearchSpace((((1, 1),),), ((4, 0),), (8,)).key()
