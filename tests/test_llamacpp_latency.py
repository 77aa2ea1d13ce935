"""A table for llama.cpp: times that follow the formula are recovered, and what cannot run there is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from words import RUNTIME, checkpoint, cut, tiny

from prunus.config import BudgetConfig, CompressConfig
from prunus.errors import UserError
from prunus.exporting import llamacpp
from prunus.inspection import inspect_latency
from prunus.models.families import dims, family_of, full
from prunus.searching.space import space_of
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.timing import llamacpp_latency, runtimes
from prunus.timing.llamacpp_latency import plan_of
from prunus.timing.timetable import Grid, Request, grid_of
from prunus.timing.whole_networks import Plan, features, fitted, solve

REQUEST = Request(prompt=16, batch=2, generate=8)


def planned(name: str, **changes: Any) -> tuple[Any, Plan, Grid]:
    model = tiny(name, **({"n_inner": 160} if name == "gpt2" else {"intermediate_size": 160}), **changes)
    grid = grid_of(dims(model.config), 32)
    return model, plan_of(model, family_of(model.config), grid), grid


def test_a_grid_of_one_width_is_a_grid() -> None:
    model = tiny("llama", intermediate_size=160)
    plan = plan_of(model, family_of(model.config), grid_of(dims(model.config), 160))
    assert plan.knots == (160,) and len(plan.networks) > 4


@pytest.mark.parametrize(
    ("name", "alone", "free"), [("llama", True, True), ("qwen3", False, False), ("gemma2", False, True)]
)
def test_times_that_follow_the_formula_are_recovered(name: str, alone: bool, free: bool) -> None:
    model, plan, grid = planned(name)
    assert (plan.attention_alone, plan.attention_free) == (alone, free)
    rng = np.random.default_rng(0)
    truth = {}
    for phase in ("prefill", "decode"):
        knots = np.sort(rng.uniform(1, 9, len(plan.knots)))
        truth[phase] = np.array([5.0, 0.7 * plan.attention_alone, 0.3, 0.2, *knots])
    rows = np.array([features(sub, plan) for sub in plan.networks])
    prefill, decode = (np.tile(rows @ truth[phase], (3, 1)) for phase in ("prefill", "decode"))
    table = fitted({}, REQUEST, grid, plan, prefill, decode)
    assert table.check == pytest.approx(0, abs=1e-9) and table.spread == pytest.approx(0, abs=1e-12)
    space = space_of(model.config, mlp_step=32, uniform=name == "gemma2")
    picked = random.Random(1)
    for _ in range(30):
        sub = space.sample(picked)
        for phase in ("prefill", "decode"):
            assert table.ms(sub, phase) == pytest.approx(float(features(sub, plan) @ truth[phase]))  # type: ignore[arg-type]


def test_the_plan_tells_every_unknown_apart() -> None:
    for name in ("llama", "qwen2", "qwen3", "phi3", "gemma2", "olmo2", "gpt2", "gpt_neox"):
        _, plan, _ = planned(name)
        rows = np.array([features(sub, plan) for sub in plan.networks[:-1]])
        used = np.abs(rows).sum(0) > 0
        rank = np.linalg.matrix_rank(rows[:, used])
        never_cut = name in ("olmo2", "gpt2", "gpt_neox")  # heads: there, groups and heads are constants of a layer too
        assert rank == used.sum() - 2 * never_cut, name
        assert len(plan.networks) <= 16


def test_unknowns_are_never_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert solve(rows, np.array([1.0, 3.0, 5.0])).min() == 0
    assert solve(rows, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])


@RUNTIME
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_table_is_measured_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    model = tiny(name)
    family, grid = family_of(model.config), grid_of(dims(model.config), 40)
    table = llamacpp_latency.measure(model, family, REQUEST, quant="q8_0", step=40, rounds=2)
    assert table.key["runtime"] == "llama.cpp" and table.key["dtype"] == "q8_0" and table.grid == grid
    assert table.request_ms(full(model.config)) > 0
    monkeypatch.setattr(llamacpp, "timed", lambda *a, **b: pytest.fail("measured again"))
    assert llamacpp_latency.measure(model, family, REQUEST, quant="q8_0", step=40) == table
    monkeypatch.undo()


@RUNTIME
def test_two_models_in_turns() -> None:
    model = tiny("llama", intermediate_size=512, num_hidden_layers=8)
    small = cut(model, SubNetwork(48, (LayerShape(1, 1, 32),) + (LayerShape(0, 0, 32),) * 7))
    budget = BudgetConfig(runtime="llama.cpp", quant="f16", prompt=64, batch=1, generate=16)
    found = runtimes.compare(model, small, budget)
    assert found["speedup"] > 1 and found["request_ms"] < found["dense_request_ms"]
    assert found["prefill_ms"] > found["token_ms"] > 0


@RUNTIME
def test_what_the_command_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llamacpp_latency, "ROUNDS", 1)
    budget = BudgetConfig(runtime="llama.cpp", quant="f16", prompt=16, batch=1, generate=4)
    where = checkpoint(tiny("llama"), tmp_path)
    stairs = tmp_path / "stairs.png"
    found = inspect_latency(CompressConfig(model=where, budget=budget), step=40, picture=str(stairs))
    assert stairs.is_file() and stairs.with_suffix(".svg").is_file()
    assert found["runtime"] == "llama.cpp" and found["dtype"] == "f16"
    assert found["dense_request_ms"] > 0 and len(found["widths"]) == 4 * 2 + 2


def test_networks_that_llama_cpp_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "installed", lambda: "0")
    budget = BudgetConfig(runtime="llama.cpp", speedup=(1.5,))

    def asked(name: str, **space: Any) -> None:
        model = tiny(name)
        runtimes.check(model, family_of(model.config), budget, space_of(model.config, **space))

    asked("llama")
    asked("gemma2", uniform=True)
    asked("olmo2", uniform=True, attention="none")
    with pytest.raises(UserError, match=r"gemma2 with layers of different widths.*--uniform"):
        asked("gemma2")
    with pytest.raises(UserError, match=r"olmo2 with fewer heads.*search\.attention=none"):
        asked("olmo2", uniform=True)
    with pytest.raises(UserError, match="no architecture for model_type 'opt'"):
        asked("opt")
    monkeypatch.setattr(llamacpp, "installed", lambda: None)
    with pytest.raises(UserError, match=r"prunus\[llama-cpp\]"):
        asked("llama")
