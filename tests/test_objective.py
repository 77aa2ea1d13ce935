"""The objective is the plain definition of KL and perplexity, whatever the prefix cache saves."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, indexed, ragged, tiny, tokens

from prunus.models.families import family_of, full
from prunus.models.slicing import activate
from prunus.models.stream import LayerStream
from prunus.searching.objective import Divergence, kl_from_logits
from prunus.subnetwork import SubNetwork


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("kind", ["kl", "ppl"])
@torch.no_grad()
def test_batched_values_are_the_plain_definition(name: str, kind: str) -> None:
    model, pool = tiny(name), tokens(5, 17)
    family = family_of(model.config)
    one = ragged(model.config, hidden=False)
    same_start = SubNetwork(one.hidden, (*one.layers[:2], *ragged(model.config, 9, hidden=False).layers[2:]))
    subs = [one, ragged(model.config), full(model.config), same_start, indexed(model.config)]
    objective = Divergence(LayerStream(model, family), pool, kind=kind, stride=3, windows=(2, 4))  # type: ignore[arg-type]
    windows = objective.draw(0, 1)
    values = objective.measure(subs, windows)
    assert values[0] == next(iter(objective(subs[:1], draw=0, rung=1)))
    dense = model(pool, use_cache=False).logits
    for sub, row in zip(subs, values, strict=True):
        for window, value in zip(windows, row, strict=True):
            ids = pool[window : window + 1]
            with activate(model, family, sub):
                logits = model(ids, use_cache=False).logits[0, 2:-1:3]
            if kind == "kl":
                expected = kl_from_logits(dense[window, 2:-1:3], logits).mean()
            else:
                expected = torch.nn.functional.cross_entropy(logits, ids[0, 3::3][: len(logits)])
            assert value == pytest.approx(float(expected), abs=1e-5)


@torch.no_grad()
def test_shared_layers_are_not_run_twice() -> None:
    model, pool = tiny("llama"), tokens(2, 16)
    stream = LayerStream(model, family_of(model.config))
    objective = Divergence(stream, pool, windows=(2,), kind="ppl")
    one = full(model.config)
    other = SubNetwork(one.hidden, (*one.layers[:3], ragged(model.config, hidden=False).layers[3]))
    list(objective([one, other], draw=0, rung=0))
    assert objective.forward_tokens == pytest.approx(32 * (1 + 1 / 4))


def test_states_of_a_candidate_alone_are_not_kept() -> None:
    """Nobody shares its layers, and the states of many windows before every layer are gigabytes."""
    model = tiny("llama")
    objective = Divergence(LayerStream(model, family_of(model.config)), tokens(6, 8), micro=2)

    def kept(subs: list[SubNetwork]) -> list[int]:
        values = objective._measure(subs, range(6), False)
        assert len(next(values)) == 6
        return [len(trail) for trail in values.gi_frame.f_locals["trails"]]  # type: ignore[attr-defined]

    assert kept([ragged(model.config)]) == [0, 0, 0]
    assert kept([ragged(model.config), full(model.config)]) == [5, 5, 5]


def test_draws_are_fresh_and_reproducible() -> None:
    model = tiny("llama")
    stream = LayerStream(model, family_of(model.config))
    objective = Divergence(stream, tokens(64, 8), windows=(4, 16), seed=3)
    assert objective.draw(1, 0) == objective.draw(1, 0) != objective.draw(2, 0)
    assert set(objective.draw(1, 0)) <= set(objective.draw(1, 1))
    lap = [w for d in range(4) for w in objective.draw(d, 1)]
    assert sorted(lap) == list(range(64))  # no window twice before all were seen
    with pytest.raises(ValueError, match="held-out"):
        list(objective([full(model.config)], draw=-1, rung=0))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_dense_model_has_no_divergence_from_itself(name: str) -> None:
    model = tiny(name)
    objective = Divergence(LayerStream(model, family_of(model.config)), tokens(2, 9), windows=(2,), stride=1)
    assert next(iter(objective([full(model.config)], 0, 0))) == pytest.approx([0, 0], abs=1e-6)
