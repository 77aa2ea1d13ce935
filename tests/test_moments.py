"""Grams and Fisher matrices are what their definitions say, for every family."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, tiny, tokens

from prunus.models.families import family_of
from prunus.models.slicing import layers_of
from prunus.models.stream import LayerStream
from prunus.scoring.moments import Grams, collect, exact_products_of, fisher, square_root, stored, writer_weight


@pytest.mark.parametrize("name", CONFIGS)
def test_grams_are_second_moments_of_the_writers_inputs(name: str) -> None:
    model, ids = tiny(name), tokens(6, 17)
    family = family_of(model.config)
    found: dict[int, Grams] = {}
    collect(LayerStream(model, family), ids, found.__setitem__, micro=4)
    for i in (0, 3):
        layer, inputs = layers_of(model, family)[i], {}
        hooks = [
            layer.get_submodule(p).register_forward_pre_hook(lambda _, x, p=p, to=inputs: to.__setitem__(p, x[0]))
            for p in (family.attention_writer, family.mlp_writer)
        ]
        with torch.no_grad():
            model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        writers = (
            (family.attention_writer, found[i].attention, found[i].attention_mean),
            (
                family.mlp_writer,
                found[i].mlp,
                found[i].mlp_mean,
            ),
        )
        for path, gram, mean in writers:
            x = inputs[path].flatten(0, -2)
            if layer.get_submodule(path).bias is not None:  # centred, because the bias takes the mean
                assert torch.allclose(mean, x.mean(0), atol=1e-4)
                x = x - x.mean(0)
            else:
                assert not mean.any()
            assert torch.allclose(gram, x.T @ x / len(x), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_openings_are_further_sequences_of_one_token(name: str) -> None:
    model, ids, first = tiny(name), tokens(4, 5), torch.arange(20, 30)[:, None]
    stream = LayerStream(model, family_of(model.config))
    both: dict[int, Grams] = {}
    alone: dict[int, Grams] = {}
    collect(stream, ids, both.__setitem__, openings=first)
    collect(stream, ids, alone.__setitem__)
    single: dict[int, Grams] = {}
    collect(stream, first, single.__setitem__)
    for which in ("attention", "mlp"):

        def moment(grams: Grams, which: str = which) -> torch.Tensor:
            mean = getattr(grams, f"{which}_mean")
            return getattr(grams, which) + torch.outer(mean, mean)

        expected = (20 * moment(alone[2]) + 10 * moment(single[2])) / 30
        assert torch.allclose(moment(both[2]), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "opt", "gemma3"])
def test_fisher_predicts_the_change_of_the_loss(name: str) -> None:
    """KL(p || p') of a small error at one writer's output is half its Fisher norm."""
    model, ids = tiny(name, dtype=torch.float64), tokens(24, 17)
    family = family_of(model.config)
    attention, mlp = fisher(model, family, ids, micro=8)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    layer = layers_of(model, family)[2]
    for path, moment in ((family.attention_writer, attention[2]), (family.mlp_writer, mlp[2])):
        error = 1e-3 * torch.randn(24, 17, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

        def add(_: object, __: object, out: torch.Tensor, error: torch.Tensor = error) -> torch.Tensor:
            return out + error.reshape(out.shape)

        with torch.no_grad():
            p = model(ids, use_cache=False).logits.log_softmax(-1)
            hook = layer.get_submodule(path).register_forward_hook(add)
            q = model(ids, use_cache=False).logits.log_softmax(-1)
            hook.remove()
        kl = float((p.exp() * (p - q)).sum())
        flat = error.flatten(0, 1).float()
        assert kl == pytest.approx(0.5 * float(((flat @ moment) * flat).sum()), rel=0.35)


def test_square_root_squares_back() -> None:
    x = torch.randn(50, 6)
    second = x.T @ x
    root = square_root(second, shrinkage=0.0)
    assert torch.allclose(root.T @ root, second, rtol=1e-4, atol=1e-4)
    half, all_alike = square_root(second, shrinkage=0.5), square_root(second, shrinkage=1.0)
    mean = second.diagonal().mean()
    assert torch.allclose(half.T @ half, (second + mean * torch.eye(6)) / 2, rtol=1e-4, atol=1e-4)
    assert torch.allclose(all_alike, mean.sqrt() * torch.eye(6), rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_writers_are_read_and_stored_in_their_own_layout(name: str) -> None:
    model = tiny(name)
    family = family_of(model.config)
    layer = layers_of(model, family)[0]
    weight = writer_weight(layer, family.mlp_writer)
    assert weight.shape == (48, 80)
    assert torch.equal(stored(layer, family.mlp_writer, weight), layer.get_submodule(family.mlp_writer).weight)


def test_bfloat16_products_lose_nothing() -> None:
    x = torch.randn(300, 40).bfloat16().float()
    exact = (x.double().T @ x.double()).float()
    with exact_products_of(torch.bfloat16):
        assert torch.allclose(x.T @ x, exact, rtol=1e-5, atol=1e-4)
