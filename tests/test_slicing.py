"""Laws of the super-network, over every family: sort once, slice forever."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CONFIGS, indexed, ragged, tiny, tokens
from torch import Tensor, nn

from prunus.models.families import AXES, Family, dims, family_of, full
from prunus.models.rows import rows
from prunus.models.slicing import activate, sort, state_of, take
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

every_family = pytest.mark.parametrize("name", CONFIGS)


def _logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens() if ids is None else ids, use_cache=False).logits
    return out


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _random_order(config: Any, seed: int = 0) -> dict[str, Tensor]:
    g, d = torch.Generator().manual_seed(seed), dims(config)
    n = config.num_hidden_layers

    def shuffled(size: int, *lead: int) -> Tensor:
        return torch.rand(*lead, size, generator=g).argsort(dim=-1)

    return {
        "hidden": shuffled(d["hidden"]),
        "kv_heads": shuffled(d["kv_heads"], n),
        "q_per_kv": shuffled(d["q_per_kv"], n, d["kv_heads"]),
        "mlp": shuffled(d["mlp"], n),
    }


# ------------------------------------------------------------------------------------------------------- sorting


@every_family
def test_sorting_leaves_the_function(name: str) -> None:
    model: Any = tiny(name)
    before = _logits(model)
    sort(model, family_of(model.config), _random_order(model.config))
    assert _relative(_logits(model), before) < 1e-5


@every_family
@pytest.mark.usefixtures("exact")
def test_sorting_leaves_the_function_exactly(name: str) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    before, weights = _logits(model), {n: p.clone() for n, p in model.named_parameters()}
    sort(model, family_of(model.config), _random_order(model.config))
    assert _relative(_logits(model), before) < 1e-9
    moved = [n for n, p in model.named_parameters() if p.ndim == 2 and torch.equal(p, weights[n])]
    assert not moved


@every_family
@pytest.mark.parametrize("units", [("hidden",), ("kv_heads",), ("q_per_kv",), ("mlp",), ("kv_heads", "mlp")])
@pytest.mark.usefixtures("exact")
def test_each_unit_can_be_sorted_alone(name: str, units: tuple[str, ...]) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    before, order = _logits(model), _random_order(model.config)
    sort(model, family_of(model.config), {u: order[u] for u in units})
    assert _relative(_logits(model), before) < 1e-9


@every_family
def test_sorting_keeps_parameters_and_ties(name: str) -> None:
    model: Any = tiny(name)
    before = [(n, id(p), p.shape) for n, p in model.named_parameters(remove_duplicate=False)]
    sort(model, family_of(model.config), _random_order(model.config))
    assert [(n, id(p), p.shape) for n, p in model.named_parameters(remove_duplicate=False)] == before


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_query_heads_are_ordered_inside_their_own_group(name: str) -> None:
    model: Any = tiny(name)
    family, d = family_of(model.config), dims(model.config)
    groups, per, size = d["kv_heads"], d["q_per_kv"], d["head_dim"]
    order = {u: o for u, o in _random_order(model.config, 3).items() if u in ("kv_heads", "q_per_kv")}
    path = next(p for p, row in family.attention.items() if row.endswith(("-> q", "-> q+kv+kv")))
    layer = model.get_submodule(family.layers)[1]
    before = layer.get_submodule(path).weight.detach().clone()[: groups * per * size]
    sort(model, family, order)
    after = layer.get_submodule(path).weight.detach()[: groups * per * size]
    was, now = before.view(groups, per, size, -1), after.view(groups, per, size, -1)
    for g in range(groups):
        old_group = int(order["kv_heads"][1, g])
        for r in range(per):
            assert torch.equal(now[g, r], was[old_group, int(order["q_per_kv"][1, old_group, r])])


def test_an_order_that_is_no_permutation_is_an_error() -> None:
    model: Any = tiny("llama")
    family, before = family_of(model.config), _logits(tiny("llama"))
    twice = torch.arange(80).repeat(4, 1)
    twice[2, 5] = 6
    with pytest.raises(ValueError, match="no permutation"):
        sort(model, family, {"mlp": twice})
    with pytest.raises(ValueError, match="neurons"):
        sort(model, family, {"neurons": torch.arange(80).repeat(4, 1)})
    assert torch.equal(_logits(model), before)


# ---------------------------------------------------------------------------------------------------- activation


@every_family
def test_the_full_subnetwork_is_the_identity(name: str) -> None:
    model: Any = tiny(name)
    before = _logits(model)
    with activate(model, family_of(model.config), full(model.config)):
        assert torch.equal(_logits(model), before)


def _fingerprint(model: Any) -> list[object]:
    tensors = [(n, id(p), p.data_ptr(), p.stride(), p.requires_grad) for n, p in model.named_parameters()]
    modules = [(n, id(m), sorted(k for k in m.__dict__ if k != "_modules")) for n, m in model.named_modules()]
    plain = [
        (n, k, repr(v))
        for n, m in model.named_modules()
        for k, v in m.__dict__.items()
        if isinstance(v, int | float | str | tuple)
    ]
    return [tensors, modules, plain, [id(getattr(m, "config", None)) for m in model.modules()]]


@every_family
@pytest.mark.parametrize("grad", [False, True])
def test_leaving_restores_the_model(name: str, grad: bool) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    before, print_before = _logits(model), _fingerprint(model)
    with torch.set_grad_enabled(grad):
        for sub in (ragged(model.config), indexed(model.config), full(model.config)):
            with activate(model, family, sub):
                _logits(model)
            assert _fingerprint(model) == print_before
    assert torch.equal(_logits(model), before)


@every_family
def test_an_exception_restores_the_model(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    before, print_before = _logits(model), _fingerprint(model)
    with pytest.raises(KeyError), activate(model, family, ragged(model.config)):
        raise KeyError
    assert _fingerprint(model) == print_before
    wrong: Any = {(1, f"{family.mlp_writer}.weight"): "not a tensor"}
    with (
        pytest.raises((TypeError, AttributeError)),
        torch.no_grad(),
        activate(model, family, full(model.config), wrong),
    ):
        pass
    assert _fingerprint(model) == print_before
    assert torch.equal(_logits(model), before)


@every_family
def test_blocks_nest(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    a, b = ragged(model.config, 5), indexed(model.config, 6)
    before, print_before = _logits(model), _fingerprint(model)
    with torch.no_grad(), activate(model, family, a):
        alone_a = _logits(model)
    with torch.no_grad(), activate(model, family, b):
        alone_b = _logits(model)
    with activate(model, family, a):  # grad mode on: what it returns to must still carry gradients
        with torch.no_grad(), activate(model, family, b):
            assert torch.equal(_logits(model), alone_b)
            with pytest.raises(RuntimeError), activate(model, family, full(model.config)):
                raise RuntimeError
            assert torch.equal(_logits(model), alone_b)
        assert torch.equal(_logits(model), alone_a)
        model(tokens(), use_cache=False, labels=tokens()).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    assert _fingerprint(model) == print_before
    assert torch.equal(_logits(model), before)


def test_an_active_model_is_neither_sorted_nor_extracted() -> None:
    model: Any = tiny("llama")
    family = family_of(model.config)
    with activate(model, family, ragged(model.config)):
        with pytest.raises(RuntimeError, match="leave `activate`"):
            sort(model, family, _random_order(model.config))
        with pytest.raises(RuntimeError, match="leave `activate`"):
            state_of(model, family, full(model.config))


@every_family
def test_inference_mode_computes_the_same(name: str) -> None:
    model: Any = tiny(name)
    family, sub = family_of(model.config), ragged(model.config)
    before = _logits(model)
    with torch.no_grad(), activate(model, family, sub):
        expected = _logits(model)
    with torch.inference_mode(), activate(model, family, sub):
        assert torch.equal(_logits(model), expected)
    with torch.inference_mode(), activate(model, family, indexed(model.config)):
        _logits(model)
    assert torch.equal(_logits(model), before)
    with activate(model, family, sub):  # the super-network is not left holding inference tensors
        model(tokens(), use_cache=False, labels=tokens()).loss.backward()


@every_family
def test_ragged_subnetworks_run_and_backpropagate(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    for sub in (ragged(model.config), ragged(model.config, 1, hidden=False), indexed(model.config)):
        model.zero_grad()
        with activate(model, family, sub):
            loss = model(tokens(), use_cache=False, labels=tokens()).loss
            loss.backward()
        assert torch.isfinite(loss)
        kept = state_of(model, family, sub)
        for row in rows(model, family):
            grad = row.parameter.grad
            if grad is not None:
                assert torch.isfinite(grad).all(), row.path
            elif row.layer is not None and row.layer < 2:  # nothing of the first two layers is dropped
                raise AssertionError(f"{row.path} has no gradient, though {len(kept)} weights are kept")


@every_family
def test_gradients_reach_only_what_is_kept(name: str) -> None:
    model: Any = tiny(name)
    family, whole = family_of(model.config), dims(model.config)
    sub = SubNetwork(whole["hidden"] // 2, (LayerShape(1, 1, 7),) * model.config.num_hidden_layers)
    with activate(model, family, sub):
        model(tokens(), use_cache=False, labels=tokens()).loss.backward()
    for row in rows(model, family):
        if row.parameter.grad is None:
            continue
        kept = {**whole, "hidden": sub.hidden}
        if row.layer is not None:
            kept |= {"kv_heads": 1, "q_per_kv": 1, "mlp": 7}
        inside = take(row.parameter.grad, row.axes, whole, kept).abs().sum()
        assert torch.isclose(inside, row.parameter.grad.abs().sum()), row.path


@every_family
def test_frozen_parameters_stay_frozen(name: str) -> None:
    model: Any = tiny(name).requires_grad_(False)
    family = family_of(model.config)
    with activate(model, family, ragged(model.config)):
        assert not any(p.requires_grad for p in model.parameters())
        assert not model(tokens(), use_cache=False, labels=tokens()).loss.requires_grad
    trained = model.get_submodule(family.final_norm).requires_grad_(True)
    with activate(model, family, ragged(model.config)):
        model(tokens(), use_cache=False, labels=tokens()).loss.backward()
    assert trained.weight.grad is not None
    assert sum(p.grad is not None for p in model.parameters()) == len(list(trained.parameters()))


@every_family
def test_outermost_cuts_are_views(name: str) -> None:
    model: Any = tiny(name)
    family, whole = family_of(model.config), dims(model.config)
    owner = {row.path: row for row in rows(model, family)}
    # hidden, KV groups and neurons are outermost wherever a weight is not fused
    sub = SubNetwork(40, (LayerShape(max(1, whole["kv_heads"] // 2), whole["q_per_kv"], 9),) * 4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), activate(model, family, sub):
            for path, parameter in model.named_parameters(remove_duplicate=False):
                row = owner[path]
                fused = any("+" in axis for axis in row.axes)
                if not fused:
                    assert parameter.data_ptr() == row.parameter.data_ptr(), path
                    assert parameter.untyped_storage().nbytes() == row.parameter.untyped_storage().nbytes(), path


@every_family
def test_an_untouched_layer_keeps_its_parameters(name: str) -> None:
    model: Any = tiny(name)
    family, whole = family_of(model.config), full(model.config)
    sub = SubNetwork(whole.hidden, (whole.layers[0], LayerShape(1, 1, 3), *whole.layers[2:]))
    same = {id(p) for p in model.parameters()}
    with activate(model, family, sub):
        for path, parameter in model.named_parameters():
            if not path.startswith(f"{family.layers}.1."):
                assert id(parameter) in same, path


@every_family
def test_overrides_take_the_place_of_weights(name: str) -> None:
    model: Any = tiny(name)
    family, sub = family_of(model.config), ragged(model.config, hidden=False)
    path = family.mlp_writer
    with torch.no_grad(), activate(model, family, sub):
        plain = _logits(model)
        weight = model.get_submodule(family.layers)[1].get_submodule(path).weight.clone()
    with torch.no_grad(), activate(model, family, sub, {(1, f"{path}.weight"): weight}):
        assert torch.equal(_logits(model), plain)
    with torch.no_grad(), activate(model, family, sub, {(1, f"{path}.weight"): 2 * weight}):
        assert not torch.allclose(_logits(model), plain)
    whole = full(model.config)
    weight = model.get_submodule(family.layers)[1].get_submodule(path).weight.detach()
    dense = _logits(model)
    with torch.no_grad(), activate(model, family, whole, {(1, f"{path}.weight"): 2 * weight}):
        assert not torch.allclose(_logits(model), dense)
    assert torch.equal(_logits(model), dense)


# --------------------------------------------------------------------------------------------- slices and masks


def _mask_writers(model: Any, family: Family, sub: SubNetwork) -> Any:
    """A copy whose writers read zeros from every member that the sub-network does not keep."""
    masked, whole = copy.deepcopy(model), dims(model.config)
    for row in rows(masked, family):
        if row.layer is None or row.parameter.ndim == 1:
            continue
        shape = sub.layers[row.layer]
        kept = {**whole, "kv_heads": shape.kv_heads, "q_per_kv": shape.q_per_kv, "mlp": shape.mlp}
        inside = row.path.removeprefix(f"{family.layers}.{row.layer}.").removesuffix(".weight")
        if inside not in (family.attention_writer, family.mlp_writer):
            continue
        axis = "q" if inside == family.attention_writer else "mlp"
        mask = torch.zeros([whole[f] for f in AXES[axis]])
        mask[tuple(slice(0, kept[f]) for f in AXES[axis])] = 1
        view = [1, 1]
        view[row.axes.index(axis)] = -1
        row.parameter.data *= mask.flatten().view(view)
    return masked


# OLMo 2's q_norm and k_norm average over all heads, so a mask on the writer cannot express a narrower attention
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "olmo2"])
@pytest.mark.usefixtures("exact")
def test_slices_equal_masks(name: str) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    family, d = family_of(model.config), dims(model.config)
    rng = random.Random(0)
    sub = SubNetwork(
        d["hidden"],
        tuple(
            LayerShape(rng.randint(1, d["kv_heads"]), rng.randint(1, d["q_per_kv"]), rng.randint(1, d["mlp"]))
            for _ in range(4)
        ),
    )
    masked = _mask_writers(model.double(), family, sub)
    with activate(model, family, sub):
        assert _relative(_logits(model), _logits(masked)) < 1e-9


def _skip(model: Any, family: Family, layer: int, path: str) -> Callable[[], None]:
    """Multiply what one sub-layer adds to the residual stream by zero, by hooks on the dense model."""

    def zero(_: nn.Module, __: object, output: object) -> object:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        assert isinstance(output, Tensor)
        return torch.zeros_like(output)

    module = model.get_submodule(family.layers)[layer].get_submodule(path)
    remove: Callable[[], None] = module.register_forward_hook(zero).remove
    return remove


@every_family
@pytest.mark.parametrize("part", ["attention", "mlp", "both"])
@pytest.mark.usefixtures("exact")
def test_a_dropped_sublayer_adds_nothing(name: str, part: str) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    family, whole = family_of(model.config), full(model.config)
    one = whole.layers[2]
    shape = LayerShape(
        0 if part != "mlp" else one.kv_heads,
        0 if part != "mlp" else one.q_per_kv,
        0 if part != "attention" else one.mlp,
    )
    sub = SubNetwork(whole.hidden, (*whole.layers[:2], shape, whole.layers[3]))
    with activate(model, family, sub):
        got = _logits(model)
    writers = {"attention": [family.attention_writer], "mlp": [family.mlp_writer]}
    paths = writers.get(part) or [family.attention_writer, family.mlp_writer]
    undo = [_skip(model, family, 2, path) for path in paths]
    expected = _logits(model)
    for remove in undo:
        remove()
    assert _relative(got, expected) < 1e-9
    assert not torch.allclose(expected, _logits(model))


@every_family
@pytest.mark.usefixtures("exact")
def test_named_members_are_a_sort_and_a_prefix(name: str) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    family, sub, d = family_of(model.config), indexed(model.config), dims(model.config)
    with activate(model, family, sub):
        got = _logits(model)

    def first(members: tuple[int, ...] | None, n: int) -> Tensor:
        assert members is not None
        return torch.tensor([*members, *(i for i in range(n) if i not in members)])

    order = {
        "kv_heads": torch.stack([first(k.kv_heads, d["kv_heads"]) for k in sub.kept]),
        "q_per_kv": torch.stack([first(k.q_per_kv, d["q_per_kv"]).expand(d["kv_heads"], -1) for k in sub.kept]),
        "mlp": torch.stack([first(k.mlp, d["mlp"]) for k in sub.kept]),
    }
    sort(model, family, order)
    with activate(model, family, SubNetwork(sub.hidden, sub.layers)):
        assert _relative(got, _logits(model)) < 1e-9


@every_family
@pytest.mark.usefixtures("exact")
def test_naming_every_member_in_another_order_changes_nothing(name: str) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    family, whole, d = family_of(model.config), full(model.config), dims(model.config)
    reverse = LayerKept(*(tuple(reversed(range(d[u]))) for u in ("kv_heads", "q_per_kv", "mlp")))
    with activate(model, family, SubNetwork(whole.hidden, whole.layers, (reverse,) * 4)):
        assert _relative(_logits(model), _logits(tiny(name, dtype=torch.float64))) < 1e-9


@every_family
def test_activated_weights_are_the_extracted_ones(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    for sub in (ragged(model.config), indexed(model.config)):
        state = state_of(model, family, sub)
        number = {old: new for new, old in enumerate(sub.alive)}
        with torch.no_grad(), activate(model, family, sub):
            seen = set()
            for row in rows(model, family):
                path = row.path
                if row.layer is not None:
                    path = path.replace(f"{family.layers}.{row.layer}.", f"{family.layers}.{number[row.layer]}.", 1)
                if path in state:
                    seen.add(path)
                    assert torch.equal(row.parameter, state[path]), path
            assert seen == set(state)
        assert all(t.is_contiguous() for t in state.values())
        assert not {t.data_ptr() for t in state.values()} & {p.data_ptr() for p in model.parameters()}


# ---------------------------------------------------------------------------------------------------- generation


@every_family
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_generation_with_and_without_cache(name: str, grad: bool) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    ids = tokens(batch=1, length=9)
    for sub in (ragged(model.config), indexed(model.config)):
        with torch.set_grad_enabled(grad), activate(model, family, sub):
            options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            with_cache = model.generate(ids, use_cache=True, **options)
            without = model.generate(ids, use_cache=False, **options)
            assert torch.equal(with_cache, without)
            assert with_cache.shape[1] == 17
