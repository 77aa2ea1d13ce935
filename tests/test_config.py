"""A configuration is checked when it is made, and reads itself back."""

from __future__ import annotations

import typing
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

import prunus
from prunus.config import (
    ANYWHERE,
    STEPS,
    CompressConfig,
    SearchConfig,
    configured,
    difference,
    flatten,
    nest,
    overrides,
    resolve,
    settings,
    to_yaml,
)
from prunus.errors import UserError
from prunus.handbook import table
from prunus.recording.changes import step_of


def make(**flat: Any) -> CompressConfig:
    return CompressConfig.from_dict({"model": "demo", **{k.replace("__", "."): v for k, v in flat.items()}})


def test_yaml_reads_back_what_it_wrote(tmp_path: Path) -> None:
    config = make(
        keep=[0.7, 0.85], search__generations=3, reform__damping=1e-7, test_text="tëst: #1.txt", revision="no"
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config, "two lines\nof comment"), encoding="utf-8")
    assert resolve(tmp_path / "c.yaml") == config


def test_every_default_survives_the_round_trip() -> None:
    config = make()
    assert CompressConfig.from_dict(config.to_dict()) == config
    assert set(flatten(config.to_dict())) == set(settings())


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: demo\nseed: 1\nsearch:\n  generations: 5\n  offspring: 7\nreform:\n")
    config = resolve(tmp_path / "c.yaml", {"search.generations": "9", "device": None})
    assert (config.seed, config.search.generations, config.search.offspring) == (1, 9, 7)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0.5 0.9", (0.9, 0.5)),
        ("0.9,0.5", (0.9, 0.5)),
        ([0.5, 0.9], (0.9, 0.5)),
        (0.5, (0.5,)),
        ("1", (1.0,)),
        (["0.5", "9e-1"], (0.9, 0.5)),
    ],
)
def test_keep_takes_every_spelling(given: Any, kept: tuple[float, ...]) -> None:
    assert make(keep=given).keep == kept


@pytest.mark.parametrize(
    ("flat", "sentence"),
    [
        ({"keep": 0}, r"keep lies in \(0, 1\]; given 0"),
        ({"keep": -0.5}, r"keep lies in \(0, 1\]"),
        ({"keep": 80}, r"for 80 per cent write 0.8"),
        ({"keep": "nan"}, r"keep lies in \(0, 1\]"),
        ({"keep": "half"}, r"keep is a number; given 'half'"),
        ({"keep": []}, r"keep is empty"),
        ({"keep": [0.5, 0.5000001]}, r"given 0.5 0.5000001; networks are named by six digits"),
        ({"budget__memory_mb": [180, 180.00001]}, r"given budget.memory_mb 180.0 180.00001; networks are named"),
        ({"keep": [0.5, 0.5]}, r"each keep ratio counts once, given 0.5 0.5"),
        ({"keep_of": "block"}, r"keep_of is one of blocks, all; given 'block' \(did you mean 'blocks'\?\)"),
        ({"score__method": "wandas"}, r"did you mean 'wanda'"),
        ({"search__objective": "accuracy"}, r"search.objective is one of kl, ppl; given 'accuracy'"),
        ({"search__generations": -1}, r"search.generations lies in \[0, inf\)"),
        ({"search__generations": 1.5}, r"search.generations is a whole number; given 1.5"),
        ({"search__generations": True}, r"search.generations is a whole number; given True"),
        ({"search__depth": "maybe"}, r"search.depth is true or false; given 'maybe'"),
        ({"reform__damping": "inf"}, r"reform.damping lies in"),
        ({"calibration__samples": 0}, r"calibration.samples lies in \[1, inf\); given 0"),
        ({"seed": None}, r"seed is a whole number; given None"),
        ({"dtype": "fp16"}, r"dtype is one of auto, float32, bfloat16, float16"),
        ({"model": ""}, r"model is text; given ''"),
        ({"model": None}, r"no model was named"),
        ({"search": 3}, r"search is a group of settings, given 3"),
        ({"samples": 3}, r"unknown setting 'samples'; did you mean 'calibration.samples'\?"),
        ({"serch__generations": 3}, r"did you mean 'search.generations'\?"),
        ({"search__mlp-step": 3}, r"did you mean 'search.mlp_step'\?"),
        ({"kep": 0.5}, r"did you mean 'keep'\?"),
        ({"zzzzzz": 0.5}, r"known are model, method, keep, "),
        ({"budget__speedup": 0.9}, r"budget.speedup lies in \(1, inf\); given 0.9"),
        ({"budget__speedup": [1.5, 1.5]}, r"each target counts once, given budget.speedup 1.5 1.5"),
        ({"budget__latency_ms": 0}, r"budget.latency_ms lies in \(0, inf\)"),
        ({"budget__speedup": 2, "budget__memory_mb": 9}, r"one kind of target, given speedup and memory_mb"),
        ({"budget__speedup": 2, "keep": 0.7}, r"one kind of target, given keep 0.7 and budget.speedup"),
        ({"budget__memory_mb": 9, "search__constraint": "flops"}, r"leave search.constraint out, given flops"),
        ({"budget__runtime": "onnx"}, r"budget.runtime is one of torch, torch.compile, llama.cpp; given 'onnx'"),
        ({"budget__quant": "q2_k"}, r"budget.quant is one of f32, f16, q8_0, q4_0; given 'q2_k'"),
    ],
)
def test_what_is_wrong_is_said_with_the_rule(flat: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(**flat)


@pytest.mark.parametrize(
    ("given", "names", "constraint"),
    [
        ({}, ["keep-0.9", "keep-0.8", "keep-0.7", "keep-0.6", "keep-0.5"], "parameters-blocks"),
        ({"keep": "0.5 1"}, ["keep-1", "keep-0.5"], "parameters-blocks"),
        ({"keep": 0.5, "search__constraint": "flops"}, ["keep-0.5"], "flops"),
        ({"budget__speedup": "2 1.25"}, ["speedup-1.25", "speedup-2"], "request_ms"),
        ({"budget__latency_ms": [30, 40]}, ["latency-40ms", "latency-30ms"], "request_ms"),
        ({"budget__tokens_per_second": "25,5"}, ["rate-5tps", "rate-25tps"], "token_ms"),
        ({"budget__memory_mb": [100, 180]}, ["memory-180mb", "memory-100mb"], "memory_bytes"),
    ],
)
def test_targets_are_named_and_the_mildest_comes_first(
    given: dict[str, Any], names: list[str], constraint: str
) -> None:
    config = make(**given)
    assert [target.name for target in config.targets] == names
    assert config.constraint == constraint
    assert CompressConfig.from_dict(config.to_dict()) == config


def test_python_is_checked_like_yaml() -> None:
    with pytest.raises(UserError, match=r"search\.generations"):
        SearchConfig(generations=-1)
    assert CompressConfig("demo", keep=[0.5]).keep == (0.5,)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        make().seed = 3  # type: ignore[misc]


def test_groups_of_settings_may_be_mappings() -> None:
    made = CompressConfig(model="m", calibration={"samples": 8}, budget={"speedup": 2}, search={})  # type: ignore[arg-type]
    assert made == make(model="m", calibration__samples=8, budget__speedup=2)
    with pytest.raises(UserError, match=r"unknown setting 'search.generation'; did you mean 'search.generations'"):
        CompressConfig(model="m", search={"generation": 8})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="search is a group of settings: a SearchConfig or a mapping; given 'shen'"):
        CompressConfig(model="m", search="shen")  # type: ignore[arg-type]


def test_a_name_is_no_configuration() -> None:
    with pytest.raises(UserError, match=r"takes a CompressConfig, as in .*; given 'demo'"):
        configured("demo")
    with pytest.raises(UserError, match="takes a CompressConfig"):
        prunus.compress("demo", "runs")
    assert configured(config := make()) is config


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    assert make(reform__damping="1e-3").reform.damping == 1e-3
    assert make(search__depth="off").search.depth is False
    assert make(test_chunks="none").test_chunks is None


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        (b"a: [", "is not YAML"),
        (b"- a\n- b", "must be a page of `key: value`"),
        (b"\xff\xfe\x00", "is not"),
        (None, "no configuration file"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, page: bytes | None, sentence: str) -> None:
    path = tmp_path / "broken.yaml"
    if page is not None:
        path.write_bytes(page)
    with pytest.raises(UserError, match=sentence) as refused:
        resolve(path)
    assert "broken.yaml" in str(refused.value)


def test_difference_names_keys() -> None:
    old, new = make().to_dict(), make(seed=1, search__workers=3).to_dict()
    assert difference(old, old) == []
    assert difference(old, new) == ["seed", "search.workers"]
    assert difference({"a": (1, 2)}, {"a": [1, 2]}) == []
    assert difference({"a": {"b": None}}, {}) == ["a.b"]


def test_flatten_and_nest_are_each_others_inverse() -> None:
    raw = make().to_dict()
    assert nest(flatten(raw)) == raw


def test_overrides_are_only_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("search: {generations: 5}\n")
    assert overrides(tmp_path / "c.yaml", {"seed": "3", "device": None}) == {"search.generations": 5, "seed": 3}
    with pytest.raises(UserError, match=r"did you mean 'search\.generations'"):
        overrides(None, {"generations": 3})


def test_every_setting_is_explained_and_belongs_to_a_step() -> None:
    for key, one in settings().items():
        assert one.help, key
        assert one.step in (*STEPS, ANYWHERE), key
    flags = [one.flag for one in settings().values() if one.flag]
    assert len(set(flags)) == len(flags)
    assert step_of("search.generations") == "search"


def test_choices_are_those_of_the_code_that_reads_them() -> None:
    from prunus.scoring import importance, scores

    assert set(settings()["score.method"].choices) == set(typing.get_args(importance.Method))
    assert set(settings()["score.aggregator"].choices) == set(typing.get_args(scores.Aggregator))


def test_the_table_in_the_docs_is_true() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert table() in page, "draw it again: python -m prunus.handbook docs/cli.md"
