"""The sequential pass: nothing to mend is left alone, and what is broken gets better on the tokens it was fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import CONFIGS, tiny, tokens

from prunus.models.families import dims, family_of, full
from prunus.models.slicing import Override, activate
from prunus.models.stream import LayerStream
from prunus.reforming.sequential import Judge, SequentialSettings, readers_of, refit_all
from prunus.searching.objective import Divergence
from prunus.subnetwork import LayerShape, SubNetwork


def narrow(config: object) -> SubNetwork:
    d = dims(config)
    layers = [LayerShape(max(1, d["kv_heads"] // 2), d["q_per_kv"], d["mlp"] // 2) for _ in range(4)]
    layers[1] = LayerShape(0, 0, d["mlp"] // 2)
    layers[2] = LayerShape(d["kv_heads"], d["q_per_kv"], 0)
    return SubNetwork(d["hidden"], tuple(layers))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_dense_network_needs_no_mending(name: str) -> None:
    model, ids = tiny(name), tokens(8, 17)
    stream = LayerStream(model, family_of(model.config))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (weights,) = refit_all(stream, ids, [(full(model.config), {})], SequentialSettings(damping=1e-2, micro=3))
    with torch.no_grad(), activate(model, stream.family, full(model.config), weights):
        changed = model(ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.allclose(changed, model(ids, use_cache=False).logits, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("drift", "readers"), [(0.0, None), (1.0, None), (1.0, 0.1)])
def test_the_last_hidden_states_come_closer(name: str, drift: float, readers: float | None) -> None:
    model, ids = tiny(name), tokens(24, 17)
    family = family_of(model.config)
    stream = LayerStream(model, family)
    sub = narrow(model.config)
    settings = SequentialSettings(drift=drift, damping=1e-2, reader_damping=readers, micro=5)
    (weights,) = refit_all(stream, ids, [(sub, {})], settings)

    def states(override: dict[tuple[int, str], torch.Tensor] | None) -> torch.Tensor:
        if override is None:
            return stream.run_from(0, stream.embed(ids))
        with activate(model, family, sub, override):
            return stream.run_from(0, stream.embed(ids))

    with torch.no_grad():
        dense, plain, mended = states(None), states({}), states(weights)
    assert float((mended - dense).square().mean()) < 0.9 * float((plain - dense).square().mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_openings_are_fitted_too(name: str) -> None:
    """First tokens that no window begins with come out nearer to the dense model's if the pass has seen them."""
    model, ids = tiny(name), tokens(12, 17)
    first = torch.arange(3, 60)[:, None]
    stream = LayerStream(model, family_of(model.config))
    sub, settings = narrow(model.config), SequentialSettings(damping=1e-2, reader_damping=0.1, micro=5)

    def distance(openings: torch.Tensor | None) -> float:
        (weights,) = refit_all(stream, ids, [(sub, {})], settings, openings=openings)
        with torch.no_grad():
            dense = stream.run_from(0, stream.embed(first))
            with activate(model, stream.family, sub, weights):
                return float((stream.run_from(0, stream.embed(first)) - dense).square().mean())

    assert distance(first) < 0.9 * distance(None)


def test_candidates_travel_together_as_they_would_alone() -> None:
    model, ids = tiny("llama"), tokens(8, 17)
    stream = LayerStream(model, family_of(model.config))
    settings = SequentialSettings(micro=3)
    pair = [(full(model.config), {}), (narrow(model.config), {})]
    together = refit_all(stream, ids, pair, settings)
    alone = refit_all(stream, ids, pair[1:], settings)[0]
    assert together[1].keys() == alone.keys()
    assert all(torch.equal(together[1][key], alone[key]) for key in alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_layer_takes_the_weights_that_were_chosen(name: str) -> None:
    model, ids = tiny(name), tokens(8, 17)
    stream, sub = LayerStream(model, family_of(model.config)), narrow(model.config)
    offered: list[Sequence[Override]] = []

    def accept(c: int, i: int, choice: Sequence[Override]) -> int:
        offered.append(choice)
        return (2, 1, 0, 0)[i]

    (weights,) = refit_all(stream, ids, [(sub, {})], SequentialSettings(), accept=accept)
    assert {i for i, _ in weights} == {1, 2, 3}  # layer 0 keeps what it had: nothing of its own
    with activate(model, stream.family, sub):
        plain = {
            (i, name): getattr(stream.layers[i].get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]).clone()
            for i, name in weights
        }
    for key, taken in weights.items():
        whole = offered[key[0]][0][key]
        wanted = (plain[key] + whole) / 2 if key[0] == 1 else whole
        assert torch.allclose(taken, wanted, atol=1e-6)
    assert not torch.allclose(
        weights[1, stream.family.mlp_writer + ".weight"], offered[1][0][1, stream.family.mlp_writer + ".weight"]
    )


def test_the_stream_is_float32_and_rounds_what_matrices_see() -> None:
    for name in CONFIGS:
        model, ids = tiny(name).to(torch.bfloat16), tokens(2, 9)
        stream = LayerStream(model, family_of(model.config))
        with torch.no_grad():
            rounded = stream.run_from(0, stream.embed(ids))
            with stream.carrying_float32():
                exact = stream.run_from(0, stream.embed(ids))
            again = stream.run_from(0, stream.embed(ids))
            reference = LayerStream(tiny(name).to(torch.bfloat16).float(), family_of(model.config))
            truth = reference.run_from(0, reference.embed(ids))
        assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16, name
        assert torch.equal(rounded, again), name
        assert float((exact - truth).norm()) < float((rounded.float() - truth).norm()), name


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_a_judged_pass_does_not_raise_the_held_out_divergence(name: str) -> None:
    model, ids, held = tiny(name), tokens(24, 17), tokens(6, 17, seed=9)
    family = family_of(model.config)
    stream, sub = LayerStream(model, family), narrow(model.config)
    judge = Judge(stream, held, [(sub, {})], tolerance=0.0, stride=1)
    start = judge.nats[0]
    (weights,) = refit_all(stream, ids, [(sub, {})], SequentialSettings(damping=1e-3), accept=judge)
    assert judge.nats[0] <= start
    assert 0 < judge.taken[0][2] < 4 or judge.nats[0] < start  # random weights: some layers only fit the noise
    with torch.no_grad(), activate(model, family, sub, weights):
        logits = stream.logits(stream.run_from(0, stream.embed(held)))
    with torch.no_grad():
        dense = model(held, use_cache=False).logits.log_softmax(-1)
    kl = float((dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean())
    assert judge.nats[0] == pytest.approx(kl, rel=1e-4)  # what it believes is what the network does
    again = Divergence(stream, held, lambda _: weights, windows=(6,), stride=1).measure([sub], range(6))[0]
    assert sum(again) / 6 == pytest.approx(kl, rel=0.2)  # the objective leaves the last position out


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_readers_that_were_refitted_before_still_aim_at_the_dense_outputs(name: str) -> None:
    """With next to no ridge the answer does not depend on what the pass begins with."""
    model, ids = tiny(name), tokens(40, 17)
    family = family_of(model.config)
    stream, sub = LayerStream(model, family), narrow(model.config)
    settings = SequentialSettings(damping=1e-5, reader_damping=1e-5, reader_stride=1, micro=5)
    (plain,) = refit_all(stream, ids, [(sub, {})], settings)
    paths = {f"{path}.weight" for part in ("attention", "mlp") for path in readers_of(family, part)}
    readers = {(i, path): plain[i, path] for i, path in plain if path in paths}
    assert {path for _, path in readers} == paths
    generator = torch.Generator().manual_seed(0)
    moved = {key: w + 0.1 * w.std() * torch.randn(w.shape, generator=generator) for key, w in readers.items()}
    (again,) = refit_all(stream, ids, [(sub, moved)], settings)

    def states(weights: dict[tuple[int, str], torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), activate(model, family, sub, weights):
            return stream.run_from(0, stream.embed(ids))

    assert float((states(again) - states(plain)).square().mean()) < 0.02 * float(states(plain).square().mean())
    for key in readers:
        assert float((again[key] - plain[key]).norm()) < 0.3 * float((moved[key] - plain[key]).norm()), key
