"""Rival methods: each on a case worked out by hand, and laws that hold for all of them on every family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny, tokens
from torch import Tensor, nn

from prunus import machine
from prunus.baselines import angular, flap, laco, llm_pruner, magnitude, sleb
from prunus.baselines import subject as methods
from prunus.baselines.activity import activity
from prunus.baselines.blockpruner import blocks, less
from prunus.baselines.subject import Subject, best, even_widths, largest, leavers, without
from prunus.baselines.table import OURS, TABLE, find, names
from prunus.errors import UserError
from prunus.evaluation import parameters
from prunus.models import costs
from prunus.models.stream import inputs_of
from prunus.scoring.moments import writer_weight
from prunus.subnetwork import LayerShape, SubNetwork

SHARES = {"depth": 0.5}  # share to ask for, by kind; 0.7 else


def subject(name: str = "llama", model: Any = None, **given: Any) -> Subject:
    return Subject(tiny(name) if model is None else model, tokens(6, 32), **{"search_tokens": 32 * 12, **given})


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens() if ids is None else ids, use_cache=False).logits
    return out


def asleep(model: Any, layer: int) -> None:
    """Make a llama layer add nothing to the residual stream."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.weight.zero_()


# ------------------------------------------------------------------------------------------------- laws of all methods


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_meets_its_budget_and_leaves_the_model_alone(name: str) -> None:
    model: Any = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    s = subject(model=model)
    for method, baseline in TABLE.items():
        if baseline.refusal(model.config.model_type):
            continue
        keep = baseline.only or SHARES.get(baseline.kind, 0.7)
        outcome, spent = s.run(lambda b=baseline, k=keep: b.run(s, k))  # type: ignore[misc]
        count = parameters(outcome.model)["blocks"]
        if baseline.structured:
            assert 0.5 * keep * s.blocks < count <= keep * s.blocks, method
            assert count < s.blocks
        else:
            assert count == s.blocks
            zeros = sum(int((p == 0).sum()) for n, p in outcome.model.named_parameters() if p.ndim == 2 and ".0." in n)
            assert zeros > 0
        assert bool(torch.isfinite(logits(outcome.model)).all()), method
        assert spent.seconds > 0
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_costs_are_charged_as_if_a_method_had_run_alone() -> None:
    s = subject()
    first = s.run(lambda: TABLE["flap"].run(s, 0.7))[1]
    second = s.run(lambda: TABLE["flap"].run(s, 0.5))[1]
    other = s.run(lambda: TABLE["magnitude"].run(s, 0.5))[1]
    assert first.forward_tokens == second.forward_tokens == s.ids.numel()
    assert other.forward_tokens == 0
    assert second.seconds > other.seconds


class Process:
    """A process whose memory is what a test says: bytes resident now, and at most since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, resident: int) -> None:
        self.now = self.most = resident
        for where in (machine, methods):
            monkeypatch.setattr(where, "reset_peak", lambda: setattr(self, "most", self.now))
            monkeypatch.setattr(where, "resident_bytes", lambda: self.now)
        monkeypatch.setattr(machine, "peak_bytes", lambda: self.most)

    def takes(self, n: int, then: int = 0) -> None:
        """n bytes for a moment, of which so many stay."""
        self.most = max(self.most, self.now + n)
        self.now += then


def test_memory_is_a_methods_own_whatever_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statistic takes 300 bytes and holds 80 (20 float32), another 250 and 40; the method takes 200 beside them.

    So its peaks are 300, 80 + 250 and 80 + 40 + 200 above the dense model, when nothing is there and at any later time.
    """
    s = subject()
    dense = 4 * sum(p.numel() for p in s.model.parameters()) + sum(b.nbytes for b in s.model.buffers())
    process = Process(monkeypatch, 10**9)

    def statistic(peak: int, n: int) -> Tensor:
        process.takes(peak, then=4 * n)
        return torch.zeros(n)

    def method(own: int) -> None:
        s.once("a", lambda: statistic(300, 20))
        s.once("b", lambda: statistic(250, 10))
        process.takes(own)

    alone = s.run(lambda: method(200))[1]
    assert alone.peak_bytes == dense + 330
    assert s.run(lambda: process.takes(70))[1].peak_bytes == dense + 70  # a neighbour is not charged for them
    s.run(lambda: s.once("gradients", lambda: statistic(10**8, 10**7)))
    assert s.run(lambda: method(200))[1].peak_bytes == alone.peak_bytes
    assert s.run(lambda: method(400))[1].peak_bytes == dense + 520
    monkeypatch.setattr(methods, "resident_bytes", lambda: 0)  # no Linux: the dense model is in the peak of the process
    assert s.run(lambda: process.takes(70))[1].peak_bytes == 70


def test_a_method_is_not_charged_for_what_really_is_in_memory() -> None:
    s = subject()
    s.run(lambda: TABLE["magnitude"].run(s, 0.7))
    before = s.run(lambda: TABLE["magnitude"].run(s, 0.7))[1]
    s.once("gradients", lambda: {"some": [torch.ones(2**26)]})
    after = s.run(lambda: TABLE["magnitude"].run(s, 0.7))[1]
    assert s._memo["gradients"].held == (2**28, 0)
    assert abs(after.peak_bytes - before.peak_bytes) < 2**26


def test_the_table() -> None:
    assert names()[0] == OURS
    assert len(set(names())) == len(TABLE) + 1
    assert {one.kind for one in TABLE.values()} == {"width", "depth", "hidden", "search", "mask"}
    with pytest.raises(UserError, match="did you mean 'slicegpt'"):
        find("slicegtp")
    for name in ("gemma2", "gemma3", "olmo2"):
        with pytest.raises(UserError, match=r"slicegpt cannot serve .*none behind it.*serves llama.*gpt2"):
            TABLE["slicegpt"].run(subject(name), 0.8)
    with pytest.raises(UserError, match=r"keeps 0\.5 of every matrix"):
        TABLE["mask-wanda-2:4"].run(subject(), 0.8)
    for baseline in TABLE.values():
        assert baseline.paper
        assert baseline.serves


@pytest.mark.parametrize("method", ["shortgpt", "angular", "laco", "sleb", "llm-pruner-channel", "slicegpt", "flap"])
def test_shares_out_of_reach_are_refused(method: str) -> None:
    with pytest.raises(UserError, match=r"keep|parameters"):
        TABLE[method].run(subject(), 0.002)


def test_shared_rules() -> None:
    s = subject()
    assert best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]
    assert [largest(lambda n, k=k: n <= k, 9) for k in (0, 1, 5, 20)] == [None, 1, 5, 9]  # type: ignore[misc]
    groups, neurons = even_widths(s, 0.7)
    assert groups == 4 - int(0.3 * 4)
    wider = SubNetwork(48, (LayerShape(groups, 2, neurons + 1),) * 4)
    assert costs.parameters(s.layout, wider) > s.budget(0.7)  # the budget is filled up
    inner, _ = even_widths(s, 0.7, [1, 2])  # two of four layers lose 60 %
    assert inner == 4 - int(0.6 * 4)
    with pytest.raises(UserError, match="1 of 4 layers pruned"):
        even_widths(s, 0.5, [1])
    assert [leavers(s, keep) for keep in (1.0, 0.8, 0.75, 0.5, 0.25)] == [0, 1, 1, 2, 3]
    with pytest.raises(UserError, match="1 of 4 always stays"):
        leavers(s, 0.2)
    assert without(s, [1]).alive == (0, 2, 3)


# --------------------------------------------------------------------------------------------------------------- width


def test_magnitude_keeps_the_columns_of_greatest_norm() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(torch.arange(80.0).expand(48, 80))  # column j has the norm j sqrt(48)
            layer.self_attn.o_proj.weight.fill_(0.01)
            layer.self_attn.o_proj.weight[:, 16:32] = 1.0  # the second of four groups of 2 x 8 columns
            layer.self_attn.o_proj.weight[:, 48:] = 0.5
    found = TABLE["magnitude"].run(subject(model=model), 0.5).sub
    width = found.layers[0].mlp
    assert found.kept[2].mlp == tuple(range(80 - width, 80))
    assert found.kept[2].kv_heads == (1, 3)


def test_wanda_sp_weighs_columns_by_what_they_read() -> None:
    """All columns are alike, so the neurons of greatest activation stay."""
    model: Any = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(0.05)
    s = subject(model=model)
    loud: list[Tensor] = []
    hidden = s.stream.embed(s.ids)
    for i, layer in enumerate(s.stream.layers):
        with inputs_of(layer, "mlp.down_proj") as seen, torch.no_grad():
            hidden = s.stream.run(i, hidden)
        loud.append(seen["mlp.down_proj"].detach().flatten(0, 1).square().mean(0))
    found = TABLE["wanda-sp-dense"].run(s, 0.7).sub
    for i, kept in enumerate(found.kept):
        want = loud[i].argsort(descending=True)[: found.layers[i].mlp]
        assert set(kept.mlp or ()) == set(want.tolist())
    walked = TABLE["wanda-sp"].run(s, 0.7).sub
    assert walked.layers == found.layers
    assert walked.kept[0] == found.kept[0]  # the first layer reads the same in both
    assert walked.kept != found.kept  # later ones do not


def test_flap_keeps_the_highest_scores_that_the_budget_has_room_for() -> None:
    """A group costs 2304 + 16 (norms aside) and a neuron 144: 48 x (8 q + 2 x 8 kv + 8 o rows) and 3 x 48."""
    s = subject()
    groups, neurons = torch.zeros(4, 4), torch.zeros(4, 80)
    groups[:, 0], groups[1:, 1] = 9.0, 8.0  # 7 groups first
    neurons[2, 5:25] = 7.0  # then 20 neurons of one layer
    neurons[0, 3] = neurons[1, 3] = neurons[3, 3] = 7.5
    norms = 4 * 2 * 48
    cost = 7 * 48 * (16 + 8 + 8 + 16) + 23 * 3 * 48 + norms
    found = flap.threshold(s, groups, neurons, cost, s.layout)
    assert [len(k.kv_heads or ()) for k in found.kept] == [1, 2, 2, 2]
    assert found.kept[2].mlp == tuple(range(5, 25))
    assert found.kept[0].mlp == (3,)
    fewer = flap.threshold(s, groups, neurons, cost - 1, s.layout)
    assert len(fewer.kept[2].mlp or ()) == 19


def test_flap_scores_are_variances_times_squared_norms_standardised_by_layer() -> None:
    s = subject()
    seen = activity(s)
    groups, neurons = flap.scores(s, seen)
    weight = writer_weight(s.stream.layers[1], "mlp.down_proj").double()
    raw = seen.variance("mlp", 1) * weight.square().sum(0)
    assert torch.allclose(neurons[1], (raw - raw.mean()) / raw.std())
    weight = writer_weight(s.stream.layers[1], "self_attn.o_proj").double()
    raw = (seen.variance("attention", 1) * weight.square().sum(0)) ** 2
    raw = (raw - raw.mean()) / raw.std()
    assert torch.allclose(groups[1], torch.stack([raw[16 * g : 16 * (g + 1)].mean() for g in range(4)]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flap_biases_keep_the_mean_output(name: str) -> None:
    """Only the first MLP loses neurons: its writer must put out the same mean over the calibration tokens."""
    s = subject(name)
    frame, held = flap.with_biases(s.model)
    assert all(held.values())
    assert torch.allclose(logits(frame), logits(s.model), atol=1e-6)
    whole = s.whole.layers
    found = flap.members(
        s, [torch.arange(shape.kv_heads) for shape in whole], [torch.arange(50), *[torch.arange(80)] * 3]
    )
    override = flap.compensation(s, activity(s), found, held)
    small = flap.extract(frame, s.family, found, override)
    path = s.family.mlp_writer
    out = [_mean_output(m, s, path) for m in (s.model, small)]
    assert torch.allclose(out[0], out[1], atol=1e-5)
    plain = _mean_output(flap.extract(frame, s.family, found), s, path)
    assert float((out[0] - plain).abs().max()) > 1e-3


def _mean_output(model: Any, s: Subject, path: str) -> Tensor:
    caught: list[Tensor] = []
    layer = model.get_submodule(s.family.layers)[0]
    hook = layer.get_submodule(path).register_forward_hook(lambda _, __, out: caught.append(out))
    logits(model, s.ids)
    hook.remove()
    return caught[0].detach().reshape(-1, caught[0].shape[-1]).mean(0)


def test_flap_says_where_a_configuration_holds_no_bias() -> None:
    assert TABLE["flap"].run(subject("llama"), 0.7).notes == ()
    assert "mistral configuration holds no bias for the writer of attention and mlp" in str(
        TABLE["flap"].run(subject("mistral"), 0.7).notes
    )
    assert "of mlp" in str(TABLE["flap"].run(subject("qwen3"), 0.7).notes)
    assert TABLE["flap-nobias"].run(subject("mistral"), 0.7).notes == ()


def test_taylor_importance_of_two_weights() -> None:
    w, g, f = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25]), torch.tensor([2.0, 1.0])
    assert llm_pruner.salience(w, g, f, "param_first").tolist() == [0.5, -0.5]
    assert llm_pruner.salience(w, g, f, "vector").sum() == 0  # the vector sees nothing where its elements cancel
    assert llm_pruner.salience(w, g, f, "param_second").tolist() == [2.0, 4.0]
    assert llm_pruner.salience(w, g, f, "param_mix").tolist() == [-0.5, -2.5]


def test_gradients_are_those_of_autograd() -> None:
    s = subject(gradient_windows=3)
    found = llm_pruner.gradients(s)
    model: Any = s.copy().requires_grad_(True)
    losses = [model(input_ids=w, labels=w).loss for w in s.ids[:3].split(1)]
    path = "model.layers.2.mlp.up_proj.weight"
    parameter = model.get_parameter(path)
    each = [torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in losses]
    assert torch.allclose(found.first[path], torch.stack(each).mean(0), atol=1e-7)
    assert torch.allclose(found.squares[path], torch.stack(each).square().mean(0), atol=1e-9)
    worth = llm_pruner.importance(s, "param_first")
    gate, up = (model.model.layers[2].mlp.get_submodule(n).weight for n in ("gate_proj", "up_proj"))
    down = model.model.layers[2].mlp.down_proj.weight
    grads = torch.autograd.grad(sum(losses) / 3, [gate, up, down])
    want = sum((w * g).abs().sum(1) for w, g in zip((gate, up), grads, strict=False)) + (down * grads[2]).abs().sum(0)
    assert torch.allclose(worth.mlp[2].float(), want.detach(), rtol=1e-4)


def test_llm_pruner_leaves_the_ends_whole_and_channels_go_everywhere() -> None:
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 16
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(config).eval()
    found = TABLE["llm-pruner"].run(subject(model=model), 0.8)
    whole = LayerShape(4, 2, 80)
    assert [i for i, shape in enumerate(found.sub.layers) if shape == whole] == [0, 1, 15]
    assert "layers 2 to 14 are cut" in found.notes
    channels = TABLE["llm-pruner-channel"].run(subject(), 0.7)
    assert channels.model.config.hidden_size == channels.sub.hidden < 48


# --------------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("method", ["shortgpt", "angular", "sleb"])
def test_a_layer_that_adds_nothing_leaves_first(method: str) -> None:
    model: Any = tiny("llama")
    asleep(model, 2)
    s = subject(model=model)
    if method == "sleb":  # others may do harm: their absence must not be better
        subs = [without(s, [i]) for i in (1, 2, 3)]
        nats = [_nats(TABLE, s, sub) for sub in subs]
        assert TABLE[method].run(s, 0.75).sub.alive == subs[nats.index(min(nats))].alive
        return
    found = TABLE[method].run(s, 0.75)
    assert found.sub.alive == (0, 1, 3)
    assert torch.allclose(logits(found.model), logits(model), atol=1e-5)


def _nats(_: Mapping[str, Any], s: Subject, sub: SubNetwork) -> float:
    model = sleb.extract(s.model, s.family, sub)
    ids = s.judged()[:1]
    return float(nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:]))


def test_greedy_methods_go_on_where_a_larger_share_ended() -> None:
    s = subject()
    half = TABLE["sleb"].run(s, 0.5)
    more = TABLE["sleb"].run(s, 0.75)
    assert half.notes[0].startswith(more.notes[0])
    spent = s.run(lambda: TABLE["sleb"].run(s, 0.5))[1]
    assert spent.forward_tokens > 0  # remembered, and charged all the same


def test_blockpruner_removes_the_sub_layer_whose_absence_costs_least() -> None:
    s = subject()
    candidates = blocks(s.whole)
    assert len(candidates) == 7  # not the attention of layer 0
    nats = [_nats(TABLE, s, less(s.whole, block)) for block in candidates]
    layer, part = candidates[nats.index(min(nats))]
    found = TABLE["blockpruner"].run(s, 0.97)
    assert found.notes[0] == f"left in this order: {part} {layer}"


def test_angles_between_states() -> None:
    e = torch.eye(3)
    states = torch.stack([e[0], e[0], e[1], -e[1]])[:, None]  # turns of 0, 90 and 180 degrees
    assert angular.distances(states, 1).tolist() == pytest.approx([0, 0.5, 1])
    assert angular.distances(states, 2).tolist() == pytest.approx([0.5, 0.5])


def test_laco_adds_the_differences_and_its_code_only_the_last() -> None:
    layers = [nn.Linear(1, 1) for _ in range(3)]
    for layer, value in zip(layers, (1.0, 3.0, 5.0), strict=True):
        nn.init.constant_(layer.weight, value)
        nn.init.constant_(layer.bias, value)
    summed = laco.merged(layers[0], layers[1:], released=False)
    assert summed.weight.item() == 1 + (3 - 1) + (5 - 1)  # type: ignore[operator]
    assert laco.merged(layers[0], layers[1:], released=True).weight.item() == 5  # type: ignore[operator]
    assert summed.bias.item() == 1  # type: ignore[operator]
    assert layers[0].weight.item() == 1


def test_laco_merges_layers_that_are_alike_without_loss() -> None:
    """Layers 1 to 3 add nothing, and neither does what they are merged into."""
    model: Any = tiny("llama")
    for i in (1, 2, 3):
        asleep(model, i)
    found = TABLE["laco"].run(subject(model=model), 0.5)
    assert found.sub.alive == (0, 1)
    assert torch.allclose(logits(found.model), logits(model), atol=1e-5)
    assert "threshold 0.95" in found.notes[0]


def test_laco_runs_no_network_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    states = laco.states
    monkeypatch.setattr(laco, "states", lambda *given: (ran.append(1), states(*given))[1])
    s = subject()
    found, spent = s.run(lambda: laco.compress(s, 0.5))
    assert "threshold 0.95" not in found.notes[0]  # so several were tried
    assert len(ran) <= 8  # the dense model's, three places, and those after a merge: not one for each threshold
    ran.clear()
    again, charged = s.run(lambda: laco.compress(s, 0.5))
    assert len(ran) == 1
    assert again.sub == found.sub
    assert charged.forward_tokens == spent.forward_tokens  # as if it had been run alone


def test_magnitude_scores_groups_with_all_their_heads() -> None:
    s = subject()
    columns = [torch.arange(64.0)] * 4
    assert magnitude.by_group(s, columns)[0].tolist() == [sum(range(16 * g, 16 * (g + 1))) for g in range(4)]
