"""Sub-networks that do not fit the super-network are refused with the limit that they break."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny

from prunus.errors import UserError
from prunus.models.families import family_of, full
from prunus.models.slicing import activate, check_subnetwork
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork


def test_subnetworks_that_do_not_fit_are_refused() -> None:
    config = tiny("llama").config
    whole = full(config)

    def changed(i: int, shape: LayerShape) -> SubNetwork:
        return SubNetwork(48, tuple(shape if j == i else s for j, s in enumerate(whole.layers)))

    refused = {
        "layers": SubNetwork(48, whole.layers[:3]),
        "hidden size 49": SubNetwork(49, whole.layers),
        "hidden size 0": SubNetwork(0, whole.layers),
        "layer 2: kv_heads 5": changed(2, LayerShape(5, 1, 1)),
        "layer 1: q_per_kv 3": changed(1, LayerShape(1, 3, 1)),
        "layer 3: mlp 81": changed(3, LayerShape(1, 1, 81)),
        "layer 3: mlp -1": changed(3, LayerShape(1, 1, -1)),
        "layer 0 is never dropped": changed(0, LayerShape(0, 0, 5)),
    }
    for words, sub in refused.items():
        with pytest.raises(UserError, match=words):
            check_subnetwork(config, sub)
        model: Any = tiny("llama")
        with pytest.raises(UserError, match=words), activate(model, family_of(config), sub):
            pass
    check_subnetwork(config, whole)


def test_named_members_that_do_not_exist_are_refused() -> None:
    model: Any = tiny("llama")
    whole = full(model.config)
    for bad in ((0, 80), (3, 3), (-1, 2)):
        layers = (LayerShape(4, 2, 2), *whole.layers[1:])
        kept = (LayerKept(mlp=bad), *(LayerKept(),) * 3)
        with pytest.raises(UserError, match="layer 0: mlp"):
            check_subnetwork(model.config, SubNetwork(48, layers, kept))
