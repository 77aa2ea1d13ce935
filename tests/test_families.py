"""Laws of the family tables: they cover every parameter, and refuse what they do not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, OPTConfig

from prunus.errors import UserError
from prunus.models.families import AXES, FAMILIES, dims, family_of, full, is_dropped, size_of
from prunus.models.rows import check, rows
from prunus.subnetwork import LayerShape

every_family = pytest.mark.parametrize("name", CONFIGS)


@every_family
def test_the_table_covers_every_parameter_once(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    check(model, family)
    found = [row.path for row in rows(model, family)]
    assert len(found) == len(set(found))
    assert set(found) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for row in rows(model, family):
        assert dict(model.named_parameters(remove_duplicate=False))[row.path] is row.parameter


@every_family
def test_axes_have_the_promised_sizes(name: str) -> None:
    model: Any = tiny(name)
    d = dims(model.config)
    for row in rows(model, family_of(model.config)):
        assert tuple(row.parameter.shape) == tuple(size_of(axis, d) for axis in row.axes), row.path


@every_family
def test_every_matrix_of_a_layer_reads_or_writes_the_residual_stream(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    assert all("hidden" in row.split(" -> ") for row in family.inner.values() if "->" in row)
    assert family.attention[family.attention_writer] == "q -> hidden"
    assert family.mlp[family.mlp_writer] == "mlp -> hidden"
    layer = model.get_submodule(family.layers)[0]
    for path in (family.attention_module, *family.mlp_modules, *family.inner):
        if path.endswith(("q_layernorm", "k_layernorm")) and not getattr(model.config, "qk_layernorm", False):
            continue
        assert isinstance(layer.get_submodule(path), torch.nn.Module)
    assert family.outer[family.embedding] == "vocab -> hidden"
    assert family.outer[family.final_norm] == "hidden"
    assert not {axis for row in family.inner.values() for side in row.split(" -> ") for axis in side.split("+")} - set(
        AXES
    )


@every_family
def test_adapters_find_their_matrices(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    matrices = {
        row.path.rpartition(".")[0].rpartition(".")[2]
        for row in rows(model, family)
        if row.layer is not None and row.parameter.ndim == 2
    }
    assert set(family.linear_names) == matrices


@every_family
def test_full_is_the_whole_model(name: str) -> None:
    model: Any = tiny(name)
    whole = full(model.config)
    assert whole.hidden == 48 and len(whole.layers) == 4 and whole.uniform
    assert whole.layers[0].kv_heads * whole.layers[0].q_per_kv == 8 and whole.layers[0].mlp == 80
    assert dims(model.config, LayerShape(1, 2, 3), 5) == {
        **dims(model.config),
        "hidden": 5,
        "kv_heads": 1,
        "q_per_kv": 2,
        "mlp": 3,
    }


def test_issue_list_of_families_is_covered() -> None:
    wanted = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi", "phi3", "gpt_neox", "opt"}
    assert wanted | {"gpt2"} <= set(FAMILIES)
    assert {family_of(make()).name for make in CONFIGS.values()} == {f.name for f in FAMILIES.values()}


def test_a_ragged_checkpoint_finds_its_family() -> None:
    class Config:
        model_type = "prunus_llama"

    assert family_of(Config()).name == "llama"


@pytest.mark.parametrize("config", [GPTNeoConfig(), object()])
def test_an_unknown_model_type_is_refused(config: object) -> None:
    with pytest.raises(UserError) as caught:
        family_of(config)
    words = str(caught.value)
    assert repr(getattr(config, "model_type", None)) in words
    assert all(known in words for known in FAMILIES)
    assert "To add one" in words


def test_the_layout_of_opt_350m_is_refused() -> None:
    config = OPTConfig(hidden_size=48, word_embed_proj_dim=24, do_layer_norm_before=False)
    with pytest.raises(UserError, match="opt-350m"):
        family_of(config)


@every_family
def test_wrong_shapes_are_refused_by_name(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    row = [r for r in rows(model, family) if r.layer == 1 and r.parameter.ndim == 2][-1]
    setattr(row.module, row.name, torch.nn.Parameter(torch.zeros(47, 80)))
    with pytest.raises(UserError, match=r"has shape \(47, 80\).*promise") as caught:
        check(model, family)
    assert row.path in str(caught.value)


def test_a_config_of_another_size_is_refused() -> None:
    model: Any = tiny("llama")
    model.config.intermediate_size = 81
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \(80, 48\)"):
        check(model, family_of(model.config))


@every_family
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    row = [r for r in rows(model, family) if r.layer == 2][3]
    row.parameter.data.view(-1)[-1] = value
    with pytest.raises(UserError, match="NaN or infinite") as caught:
        check(model, family)
    assert row.path in str(caught.value)


@every_family
def test_a_parameter_without_a_row_is_refused_by_name(name: str) -> None:
    model: Any = tiny(name)
    family = family_of(model.config)
    layer = model.get_submodule(family.layers)[3]
    layer.extra = torch.nn.Linear(48, 3)
    with pytest.raises(UserError, match=r"no row for '.*\.3\.extra\.weight' \(2 parameters"):
        check(model, family)


def test_meta_models_can_be_checked() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    check(model, family_of(model.config))


def test_sizes_that_configs_leave_out() -> None:
    assert dims(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=None))["head_dim"] == 16
    gpt2 = CONFIGS["gpt2"]()
    gpt2.n_inner = None
    assert dims(gpt2)["mlp"] == 4 * 48
    assert dims(CONFIGS["opt"]())["positions"] == 66


@pytest.mark.parametrize(
    ("part", "shape", "dropped"),
    [
        ("attention", LayerShape(0, 0, 1), True),
        ("attention", LayerShape(1, 1, 0), False),
        ("mlp", LayerShape(1, 1, 0), True),
        ("block", LayerShape(1, 1, 0), False),
        ("block", LayerShape(0, 0, 0), True),
        ("outer", LayerShape(0, 0, 0), False),
    ],
)
def test_which_rows_leave_with_a_sublayer(part: Any, shape: LayerShape, dropped: bool) -> None:
    assert is_dropped(part, shape) is dropped
