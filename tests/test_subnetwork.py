"""A sub-network is a page of small integers: equality, JSON both ways, a short name, and what is uniform."""

from __future__ import annotations

import pytest

from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

WHOLE = LayerShape(4, 2, 80)
PLAIN = SubNetwork(48, (WHOLE,) * 3)
NAMED = SubNetwork(48, (LayerShape(2, 1, 3),) * 2, (LayerKept((3, 0), (1,), (7, 5, 2)), LayerKept(mlp=(0, 1, 2))))


@pytest.mark.parametrize("sub", [PLAIN, NAMED, SubNetwork(1, ()), SubNetwork(24, (LayerShape(0, 0, 0), WHOLE))])
def test_json_both_ways(sub: SubNetwork) -> None:
    back = SubNetwork.from_json(sub.to_json())
    assert back == sub and hash(back) == hash(sub) and back.key() == sub.key()
    assert back.to_json() == sub.to_json()


def test_the_key_is_short_stable_and_differs() -> None:
    others = [
        PLAIN,
        NAMED,
        SubNetwork(47, PLAIN.layers),
        SubNetwork(48, PLAIN.layers[:2]),
        SubNetwork(48, NAMED.layers),
        SubNetwork(48, NAMED.layers, (NAMED.kept[0], LayerKept(mlp=(0, 2, 1)))),
    ]
    assert len({s.key() for s in others}) == len(others)
    assert all(len(s.key()) == 16 and int(s.key(), 16) >= 0 for s in others)
    assert PLAIN.key() == SubNetwork(48, tuple(LayerShape(4, 2, 80) for _ in range(3))).key()


def test_prefixes_and_named_members_without_names_share_no_json_noise() -> None:
    assert "kept" not in PLAIN.to_json()
    assert "kept" in NAMED.to_json()


def test_which_layers_still_compute() -> None:
    layers = (WHOLE, LayerShape(0, 0, 0), LayerShape(0, 0, 5), LayerShape(1, 1, 0), LayerShape(0, 2, 0))
    assert SubNetwork(48, layers).alive == (0, 2, 3)
    assert not LayerShape(2, 0, 1).attends


@pytest.mark.parametrize(
    ("layers", "uniform"),
    [
        ((WHOLE, WHOLE), True),
        ((WHOLE, LayerShape(0, 0, 0), WHOLE), True),  # whole layers gone: a stock config of fewer layers
        ((LayerShape(2, 1, 9),) * 2, True),
        ((WHOLE, LayerShape(4, 2, 79)), False),
        ((WHOLE, LayerShape(4, 1, 80)), False),
        ((WHOLE, LayerShape(0, 0, 80)), False),
        ((LayerShape(4, 2, 0),) * 2, False),  # no stock class builds a layer without its MLP
        ((LayerShape(0, 0, 0),) * 2, False),
    ],
)
def test_what_a_stock_config_can_describe(layers: tuple[LayerShape, ...], uniform: bool) -> None:
    assert SubNetwork(48, layers).uniform is uniform


def test_named_members_must_agree_with_the_widths() -> None:
    with pytest.raises(ValueError, match="layer 1 keeps 80 of mlp, but names 2 members"):
        SubNetwork(48, (WHOLE, WHOLE), (LayerKept(), LayerKept(mlp=(0, 1))))
    with pytest.raises(ValueError, match="one LayerKept per layer"):
        SubNetwork(48, (WHOLE, WHOLE), (LayerKept(),))
