"""A table for `torch.compile`: what runs is what `generate` runs, networks cost no memory, formulas are recovered."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ragged
from words import checkpoint, cut, tiny

from prunus.config import BudgetConfig, CompressConfig
from prunus.errors import UserError
from prunus.inspection import inspect_latency
from prunus.models.families import dims, family_of, full
from prunus.models.slicing import extract
from prunus.searching.space import space_of
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.timing import compiled_latency, runtimes
from prunus.timing.compiled_latency import CompiledRunner, borrowing, plan_of
from prunus.timing.timetable import Request, grid_of
from prunus.timing.whole_networks import features, fitted

REQUEST = Request(prompt=16, batch=2, generate=4)
COMPILER = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)


def eager(model: Any, **_: Any) -> Any:
    """Stands in for the compiler: what is timed is not what these tests are about."""
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "phi"])
def test_times_that_follow_the_formula_are_recovered(name: str) -> None:
    model = tiny(name)
    family, grid = family_of(model.config), grid_of(dims(model.config), 20)
    plan = plan_of(model, family, grid)
    assert plan.attention_alone and plan.attention_free and plan.stub == 0
    rng = np.random.default_rng(0)
    knots = np.sort(rng.uniform(1, 9, len(plan.knots)))
    truth = np.array([5.0, 0.7, 0.3, 0.2, *knots])
    ms = np.tile(np.array([features(sub, plan) for sub in plan.networks]) @ truth, (3, 1))
    table = fitted({}, REQUEST, grid, plan, ms, 2 * ms)
    assert table.check == pytest.approx(0, abs=1e-9)
    space, picked = space_of(model.config, mlp_step=20), random.Random(1)
    for _ in range(30):
        sub = space.sample(picked)
        assert table.ms(sub, "prefill") == pytest.approx(float(features(sub, plan) @ truth))
        assert table.ms(sub, "decode") == pytest.approx(2 * float(features(sub, plan) @ truth))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_networks_borrow_the_memory_of_the_model(name: str) -> None:
    model = tiny(name)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small: Any = borrowing(extract(model, family_of(model.config), ragged(model.config)), model)
    assert {p.untyped_storage().data_ptr() for p in small.parameters()} <= own
    out = small(input_ids=torch.arange(12)[None])
    assert out.logits.shape[:2] == (1, 12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_a_runner_decodes_what_generate_decodes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", eager)
    model = tiny("llama")
    if kind == "ragged":
        model = extract(model, family_of(model.config), ragged(model.config))  # type: ignore[assignment]
    ids = torch.arange(5, 21).reshape(2, 8)
    want = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")[:, 8:]
    runner = CompiledRunner(model, Request(prompt=8, batch=2, generate=4))
    for _ in range(2):  # the second request begins with an empty cache
        found = [model(input_ids=ids, past_key_values=runner.cache(), use_cache=True).logits[:, -1:].argmax(-1)]
        for _ in range(3):
            out = runner.step(input_ids=found[-1], past_key_values=runner.static, use_cache=True)
            found.append(out.logits[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(found, 1), want)


@COMPILER
def test_a_table_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really compiled; two networks stand for the plan's fifteen, since a compiler takes seconds for each."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    model = tiny("llama", num_hidden_layers=2)
    family, grid = family_of(model.config), grid_of(dims(model.config), 40)
    plan = plan_of(model, family, grid)
    compiled: list[Any] = []
    monkeypatch.setattr(
        compiled_latency, "_compile", lambda *a, real=compiled_latency._compile: compiled.append(real(*a))
    )

    def few(model: Any, family: Any, networks: Any, request: Request, **options: Any) -> Any:
        prefill, decode = timed(model, family, networks[:2], request, **options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
        return np.repeat(prefill[:, :1], len(networks), 1), np.repeat(decode[:, :1], len(networks), 1)

    timed = compiled_latency.time_networks
    monkeypatch.setattr(compiled_latency, "time_networks", few)
    torch._dynamo.utils.counters.clear()
    table = compiled_latency.measure(model, family, REQUEST, step=40, rounds=1)
    assert table.key["runtime"] == "torch.compile" and table.grid == grid and len(compiled) == 2
    assert table.request_ms(full(model.config)) > 0 and len(plan.networks) <= 16
    monkeypatch.setattr(compiled_latency, "time_networks", lambda *a, **b: pytest.fail("measured again"))
    assert compiled_latency.measure(model, family, REQUEST, step=40) == table


def test_two_models_in_turns_and_what_the_command_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_latency, "check_compiles", lambda device: None)
    model = tiny("llama", intermediate_size=512, num_hidden_layers=8)
    small = cut(model, SubNetwork(48, (LayerShape(1, 1, 32),) + (LayerShape(0, 0, 32),) * 7))
    budget = BudgetConfig(runtime="torch.compile", prompt=64, batch=1, generate=8)
    found = runtimes.compare(model, small, budget)
    assert found["speedup"] > 1 and found["request_ms"] < found["dense_request_ms"]
    shown = inspect_latency(CompressConfig(model=checkpoint(tiny("llama"), tmp_path), budget=budget), step=40)
    assert shown["runtime"] == "torch.compile" and shown["dense_request_ms"] > 0


def test_a_machine_that_cannot_compile_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")

    monkeypatch.setattr(torch, "compile", broken)
    compiled_latency.check_compiles.cache_clear()  # it may have worked before
    model = tiny("llama")
    budget = BudgetConfig(runtime="torch.compile", speedup=(1.5,))
    with pytest.raises(UserError, match=r"No working C\+\+ compiler.*leave --runtime out"):
        runtimes.check(model, family_of(model.config), budget, space_of(model.config))
