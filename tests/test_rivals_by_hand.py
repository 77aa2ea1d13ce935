"""Rival methods on a network of two layers whose every activation and gradient is written down: scores by hand.

Four tokens, each alone in its window; token i has the embedding 10^9 e_i, so whatever the layers add, every norm gives
2 e_i. The gates give 1. So neuron j reads 2 u_ji, and the attention's writer reads 2 v_ci, once for each query head.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prunus.baselines import flap, llm_pruner
from prunus.baselines.activity import activity
from prunus.baselines.blockpruner import less
from prunus.baselines.subject import Subject, members
from prunus.baselines.table import TABLE
from prunus.models.slicing import extract
from prunus.scoring.moments import writer_weight
from prunus.subnetwork import LayerShape, SubNetwork

GROUPS, HEADS, HEAD_DIM, NEURONS = 2, 4, 2, 4  # columns of the attention's writer: (group, head of the group, dim)


def written_down() -> Any:
    """Two layers of width 4, two KV groups of two query heads; v, up and the writers are to be filled in."""
    config = LlamaConfig(
        vocab_size=4, hidden_size=4, intermediate_size=NEURONS, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD_DIM, hidden_act="relu", rms_norm_eps=0.0, max_position_embeddings=8,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
        model.model.embed_tokens.weight.copy_(1e9 * torch.eye(4))
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.fill_(0.5)
    return model


def fill(
    layer: Any, *, v: list[Any] | None = None, o: list[Any] | None = None, up: Any = None, down: Any = None
) -> None:
    """Readers as what they give for the four tokens, by row; writers by column."""
    with torch.no_grad():
        for module, rows in ((layer.self_attn.v_proj, v), (layer.mlp.up_proj, up)):
            if rows is not None:
                module.weight.copy_(torch.tensor(rows, dtype=torch.float32) / 2)
        for module, columns in ((layer.self_attn.o_proj, o), (layer.mlp.down_proj, down)):
            if columns is not None:
                module.weight.copy_(torch.tensor(columns, dtype=torch.float32).T)


def subject(model: Any) -> Subject:
    return Subject(model, torch.arange(4)[:, None])


# ---------------------------------------------------------------------------------------------------------------- flap


def fluctuating() -> Any:
    """Neurons of variances 0, 1, 1/4, 1 before columns of squared norms 400, 1, 8, 3: scores 0, 1, 2, 3.

    Group 0 has columns of var |w|^2 = 2, 0, 0, 0 and group 1 of 1, 1, 1, 0. All weights of layer 1 are 10 times larger.
    """
    model = written_down()
    for scale, layer in zip((1.0, 10.0), model.model.layers, strict=True):
        fill(
            layer,
            v=[[0, 2, 0, 2], [3, 3, 3, 3], [2, 0, 2, 0], [1, -1, -1, 1]],
            o=(scale * torch.tensor([
                [1, 1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0], [0, 5, 0, 0],
                [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0],
            ])).tolist(),
            up=[[5, 5, 5, 5], [0, 2, 0, 2], [1, 0, 1, 0], [6, 6, 4, 4]],
            down=(scale * torch.tensor([[20, 0, 0, 0], [0, 1, 0, 0], [2, 2, 0, 0], [1, 0, 1, 1]])).tolist(),
        )  # fmt: skip
    return model


def test_flap_scores() -> None:
    """0, 1, 2, 3 have the mean 1.5 and the variance 5/3; 2 0 0 0 1 1 1 0 squared the mean 7/8 and 12.875/7.

    Group 0 has the higher score only because the attention's are squared: 4/4 against 3/4, not 2/4 against 3/4.
    """
    s = subject(fluctuating())
    groups, neurons = flap.scores(s, activity(s))
    want = [(x - 1.5) / math.sqrt(5 / 3) for x in (0, 1, 2, 3)]
    off = 0.125 / math.sqrt(12.875 / 7)
    for i in range(2):  # each layer by its own mean and deviation: the tenfold weights of layer 1 do not matter
        assert neurons[i].tolist() == pytest.approx(want, abs=1e-3)
        assert groups[i].tolist() == pytest.approx([off, -off], abs=1e-3)


def test_flap_bias_takes_over_the_mean_of_what_leaves() -> None:
    """Neuron 0 always gives 5 into (20, 0, 0, 0), neuron 3 on average 5 into (1, 0, 1, 1).

    Group 1 gives 1 and 0 on average: its first dimension goes into (1, 0, 0, 0) and, by the second head, (0, 0, 0, 1).
    """
    s = subject(fluctuating())
    sub = members(s, [torch.tensor([0])] * 2, [torch.tensor([1, 2])] * 2)
    biases = flap.compensation(s, activity(s), sub, {"attention": True, "mlp": True})
    assert biases[0, "mlp.down_proj.bias"].tolist() == pytest.approx([105, 0, 5, 5], rel=1e-4)
    assert biases[0, "self_attn.o_proj.bias"].tolist() == pytest.approx([1, 0, 0, 1], abs=1e-4)
    assert biases[1, "self_attn.o_proj.bias"].tolist() == pytest.approx([10, 0, 0, 10], abs=1e-4)


def test_flap_mean_of_what_leaves_whole_goes_to_the_sub_layer_before() -> None:
    """The groups of layer 1 give (1, 3, 1, 3) and (1, 0, 1, 0): (100, 160, 0, 0) and (10, 0, 0, 10) by their writer.

    Its neurons give (5, 1, 0.5, 5) into columns 200 e_0, 10 e_1, 20 (e_0 + e_1), 10 (e_0 + e_2 + e_3).
    """
    s = subject(fluctuating())
    held, some, none = {"attention": True, "mlp": True}, torch.tensor([0, 1]), torch.tensor([], dtype=torch.long)
    every = torch.arange(4)

    def biases(groups: Tensor, neurons: Tensor) -> dict[str, list[float]]:
        sub = members(s, [some, groups], [torch.tensor([1, 2]), neurons])
        found = flap.compensation(s, activity(s), sub, held)
        return {f"{i} {path.split('.')[1]}": bias.tolist() for (i, path), bias in found.items()}

    attention, mlp, own = [110, 160, 0, 10], [1000 + 10 + 50, 20, 50, 50], [105, 0, 5, 5]  # own: of layer 0's MLP
    for groups, neurons, want in (
        (none, every, {"0 down_proj": [a + b for a, b in zip(own, attention, strict=True)], "1 down_proj": [0] * 4}),
        (some, none, {"0 down_proj": own, "1 o_proj": mlp}),
        (none, none, {"0 down_proj": [sum(x) for x in zip(own, attention, mlp, strict=True)]}),
    ):
        found = biases(groups, neurons)
        assert found.keys() == {"0 o_proj", *want}
        for path, bias in want.items():
            assert found[path] == pytest.approx(bias, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", ["llama-mqa-tied-bias", "gpt2", "phi", "gpt_neox"])
@pytest.mark.parametrize("gone", [(2, "attention"), (2, "mlp"), "layer"])
def test_flap_loses_nothing_of_a_sub_layer_that_is_constant(name: str, gone: Any) -> None:
    """One that gives the same whatever it reads leaves whole: its constant moves into a bias, and no logit changes."""
    s = of(name)
    places: list[Any] = [(2, "attention"), (2, "mlp")] if gone == "layer" else [gone]
    sub = s.whole
    for place in places:
        with torch.no_grad():
            writer_weight(s.stream.layers[2], flap.writers(s.family)[place[1]]).zero_()
        sub = less(sub, place)
    kept = [[torch.arange(n) for n in (shape.kv_heads, shape.mlp)] for shape in sub.layers]
    sub = members(s, [groups for groups, _ in kept], [neurons for _, neurons in kept])
    held = {"attention": True, "mlp": True}
    small = extract(s.model, s.family, sub, flap.compensation(s, activity(s), sub, held))
    assert flap.orphans(s, sub, held) == []
    assert torch.allclose(logits(small, s), logits(s.model, s), atol=1e-5)
    assert not torch.allclose(logits(extract(s.model, s.family, sub), s), logits(s.model, s), atol=1e-2)


def test_flap_says_where_the_mean_of_a_whole_sub_layer_is_lost() -> None:
    """Before an attention of qwen3 stands an MLP without a bias; before one of its MLPs an attention that has one."""
    for name, lost in (("qwen3", [(2, "attention")]), ("gemma2", [(2, "attention"), (3, "mlp")]), ("llama", [])):
        s = of(name)
        sub = less(less(s.whole, (2, "attention")), (3, "mlp"))
        assert flap.orphans(s, sub, flap.with_biases(s.model)[1]) == lost
    low = TABLE["flap"].run(of("gemma2"), 0.2)
    gone = sum(not shape.attends for shape in low.sub.layers) + sum(not shape.mlp for shape in low.sub.layers)
    assert gone and f"the mean output of {gone} sub-layers that left whole is lost" in low.notes[-1]
    assert "lost" not in str(TABLE["flap"].run(of("llama"), 0.2).notes)


def of(name: str) -> Subject:
    return Subject(tiny(name), tokens(6, 32))


def logits(model: Any, s: Subject) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(s.ids, use_cache=False).logits
    return found


# --------------------------------------------------------------------------------------------------------------- wanda


@pytest.mark.parametrize("method", ["wanda-sp", "wanda-sp-dense"])
def test_wanda_sp_takes_the_mean_of_columns_and_the_sum_of_a_group(method: str) -> None:
    """Neurons: mean |w| times |x|: 1 x 1, 1.5 x 1, .5 x 2, 10 x .1. Norms of columns or weights alone choose others.

    Columns of the attention in quarters: 5 0 0 0 for group 0, 2 1.5 2 1.5 for group 1, which has the greater sum, 7.
    It has the smaller one, 3.5, if heads are taken to alternate between groups. In layer 1 the groups change places.
    """
    model = written_down()
    wide, even = [[5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9]], [[2, 0, 0, 0], [0, -1.5, 0, 0]] * 2
    read_wide, read_even = [[1, -1, 1, 1], [0, 0, 0, 0]], [[1, 1, -1, 1], [1, -1, 1, 1]]  # |x| = 1 0, 1 1
    for i, layer in enumerate(model.model.layers):
        fill(
            layer,
            v=read_wide + read_even if i == 0 else read_even + read_wide,
            o=wide + even if i == 0 else even + wide,
            up=[[1, 1, 1, 1], [1, 1, -1, -1], [2, 2, 2, -2], [0.1, 0.1, -0.1, 0.1]],
            down=[[4, 0, 0, 0], [1.5, -1.5, 1.5, 1.5], [0, 2, 0, 0], [10, 10, 10, 10]],
        )
    found = TABLE[method].run(subject(model), 0.5).sub
    assert [shape.kv_heads for shape in found.layers] == [1, 1]
    assert [kept.kv_heads for kept in found.kept] == [(1,), (0,)]
    assert [kept.mlp for kept in found.kept] == [(1,), (1,)]


# ---------------------------------------------------------------------------------------------------------- llm-pruner


def gradients(model: Any, given: dict[str, dict[tuple[int, ...], float]]) -> llm_pruner.Gradients:
    """Gradients that are zero but for the given elements."""
    first = {path: torch.zeros_like(p) for path, p in model.named_parameters()}
    for path, elements in given.items():
        for at, value in elements.items():
            first[path][at] = value
    return llm_pruner.Gradients(first, {path: torch.zeros_like(g) for path, g in first.items()})


def ones(monkeypatch: pytest.MonkeyPatch, given: dict[str, dict[tuple[int, ...], float]]) -> Subject:
    """A subject whose weights are all 1, so that the importance of a weight is its gradient."""
    model = written_down()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    found = gradients(model, given)
    monkeypatch.setattr(llm_pruner, "gradients", lambda _: found)
    return subject(model)


def test_llm_pruner_sums_over_a_group_with_its_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of q: two heads of two for group 0, then group 1; so the columns of o. Rows of k and v: two for each."""
    layer = "model.layers.1."
    s = ones(
        monkeypatch,
        {
            layer + "self_attn.q_proj.weight": {(0, 0): 3, (0, 1): -2, (3, 1): 1, (5, 1): 10},
            layer + "self_attn.k_proj.weight": {(1, 2): -100, (2, 0): 200},
            layer + "self_attn.v_proj.weight": {(3, 3): 1000},
            layer + "self_attn.o_proj.weight": {(2, 3): 10_000, (1, 3): -4_000, (0, 6): 20_000},
            layer + "mlp.gate_proj.weight": {(0, 1): 1, (0, 2): -1, (3, 0): 2},
            layer + "mlp.up_proj.weight": {(0, 3): 10},
            layer + "mlp.down_proj.weight": {(1, 0): 100, (2, 0): -300, (0, 2): 7},
        },
    )
    worth = llm_pruner.importance(s, "param_first")
    assert worth.kv_heads.tolist() == [[0, 0], [3 + 2 + 1 + 100 + 14_000, 10 + 200 + 1000 + 20_000]]
    assert worth.mlp.tolist() == [[0, 0, 0, 0], [2 + 10 + 400, 0, 7, 2]]
    vector = llm_pruner.importance(s, "vector")  # a row of q, k, v, gate or up is summed first, a column of o or down
    assert vector.kv_heads.tolist() == [[0, 0], [1 + 1 + 100 + 6_000, 10 + 200 + 1000 + 20_000]]
    assert vector.mlp.tolist() == [[0, 0, 0, 0], [0 + 10 + 200, 0, 7, 2]]


def test_llm_pruner_channels_leave_by_what_the_whole_model_reads_and_writes_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Channels have 1 (embedding), 2 (a norm) and then 4 (writers of both layers) and .5 (the output matrix)."""
    s = ones(
        monkeypatch,
        {
            "model.embed_tokens.weight": {(3, 0): -1},
            "model.layers.0.input_layernorm.weight": {(1,): 2},
            "model.layers.0.self_attn.o_proj.weight": {(2, 5): 1.5},
            "model.layers.1.mlp.down_proj.weight": {(2, 0): -2.5},
            "lm_head.weight": {(0, 3): 0.5},
        },
    )
    assert llm_pruner.importance(s, "param_first").hidden.tolist() == [1, 2, 4, 0.5]
    with torch.no_grad():  # name the channels in every matrix, where no gradient looks
        model: Any = s.model
        model.model.embed_tokens.weight[0] = torch.arange(4.0)
        model.lm_head.weight[1] = torch.arange(4.0)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:] = torch.arange(4.0)
            layer.mlp.down_proj.weight[:, 1] = torch.arange(4.0)
            layer.post_attention_layernorm.weight[:] = torch.arange(4.0)
    small: Any = TABLE["llm-pruner-channel"].run(s, 0.5).model
    assert small.model.embed_tokens.weight[0].tolist() == [2, 1]
    assert small.lm_head.weight[1].tolist() == [2, 1]
    for layer in small.model.layers:
        assert layer.self_attn.q_proj.weight.tolist() == [[2, 1]] * 8
        assert layer.mlp.down_proj.weight[:, 1].tolist() == [2, 1]
        assert layer.post_attention_layernorm.weight.tolist() == [2, 1]


# --------------------------------------------------------------------------------------------------------- blockpruner


def test_blockpruner_judges_all_that_is_left_after_every_removal() -> None:
    """Every removal against all others that were possible then, each network made and run for itself."""
    s = Subject(tiny("llama", seed=3), tokens(6, 32))
    note = TABLE["blockpruner"].run(s, 0.6).notes[0].removeprefix("left in this order: ")
    order = [(part, int(i)) for part, i in (one.split() for one in note.split(", "))]
    assert len(order) >= 3
    everything = [("attention", 1), ("attention", 2), ("attention", 3), *(("mlp", i) for i in range(4))]
    gone: list[tuple[str, int]] = []
    alone = {block: _nats(s, [block]) for block in everything}
    for block in order:
        nats = {one: _nats(s, [*gone, one]) for one in everything if one not in gone}
        assert block == min(nats, key=lambda one: nats[one])
        gone.append(block)
    assert gone != sorted(everything, key=lambda one: alone[one])[: len(gone)]  # so judging once would not do


def _nats(s: Subject, gone: list[tuple[str, int]]) -> float:
    shapes = []
    for i in range(4):
        heads = (0, 0) if ("attention", i) in gone else (4, 2)
        shapes.append(LayerShape(*heads, 0 if ("mlp", i) in gone else 80))
    model: Any = extract(s.model, s.family, SubNetwork(48, tuple(shapes)))
    ids: Tensor = s.ids[:1]  # the windows are shorter than the one that it judges by
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


# ---------------------------------------------------------------------------------------------------------------- sleb


def test_sleb_judges_all_that_is_left_after_every_removal() -> None:
    """Two of four layers, each the best of all that were possible then, and not the two that are best alone."""
    s = Subject(tiny("llama", seed=1), tokens(6, 32))

    def nats(*layers: int) -> float:
        return _nats(s, [(part, i) for i in layers for part in ("attention", "mlp")])

    alone = sorted((1, 2, 3), key=nats)
    first = alone[0]
    second = min({1, 2, 3} - {first}, key=lambda i: nats(first, i))
    assert second != alone[1]  # so judging once would not do
    found = TABLE["sleb"].run(s, 0.5)
    assert found.notes == (f"left in this order: {first}, {second}",)
    assert found.sub.alive == tuple(i for i in range(4) if i not in (first, second))
