"""The table is measured on real modules: with a clock that counts parameters, predictions are exact in every family."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny
from torch import nn

from prunus.errors import UserError
from prunus.models.families import dims, family_of, full
from prunus.models.slicing import extract, layers_of
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.timing import latency
from prunus.timing.latency import EMPTY, Lap, Laps, Probe, WallClock, build, compare, measure, plan, time_models
from prunus.timing.timetable import Request, grid_of

REQUEST = Request(prompt=6, batch=2, generate=3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    return tmp_path


class Counting:
    """A clock that goes on by one for every parameter that a forward uses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(self.now)

    def read(self) -> list[float]:
        spans = [b - a for a, b in pairwise(self.marks)]
        self.marks.clear()
        return spans

    def watch(self, model: nn.Module) -> None:
        def used(module: nn.Module, *_: Any) -> None:
            self.now += own(module)

        for module in model.modules():
            if own(module):
                module.register_forward_hook(used)


def own(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_grid(config: Any, grid: Any, seed: int) -> SubNetwork:
    rng = random.Random(seed)
    layers = [
        LayerShape(rng.choice(grid.kv_heads), rng.choice(grid.q_per_kv), rng.choice(grid.mlp))
        for _ in range(config.num_hidden_layers)
    ]
    layers[1] = LayerShape(0, 0, rng.choice(grid.mlp))
    layers[2] = LayerShape(1, 1, 0)
    layers[3] = EMPTY if seed % 2 else layers[3]
    return SubNetwork(dims(config)["hidden"], tuple(layers))


@pytest.mark.parametrize("name", CONFIGS)
def test_predictions_are_what_whole_networks_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny(name)
    family, clock = family_of(model.config), Counting()

    def counted(models: Sequence[Any], *rest: Any, **given: Any) -> list[Laps]:
        for one in models:
            clock.watch(one)
        return time_models(models, *rest, **{**given, "clock": clock})

    monkeypatch.setattr(latency, "time_models", counted)
    table = measure(model, family, REQUEST, rounds=1)
    assert (table.spread, table.check) == (0, 0)
    for seed in range(4):
        sub = on_grid(model.config, table.grid, seed)
        small = extract(model, family, sub, uniform=False)
        inside = sum(map(numel, layers_of(small, family)))
        clock.watch(small)
        (found,) = time_models([small], REQUEST, rounds=1, clock=clock)
        for phase in ("prefill", "decode"):
            assert table.ms(sub, phase) == found.median(phase)  # type: ignore[arg-type]
            outside = table.prefill.outside if phase == "prefill" else table.decode.outside
            assert table.ms(sub, phase) == outside + inside  # type: ignore[arg-type]
        assert table.request_ms(sub) == found.requests(REQUEST)[0]


def test_doors_time_each_layer_by_itself() -> None:
    model: Any = tiny("llama")
    family, clock = family_of(model.config), Counting()
    small = extract(model, family, on_grid(model.config, grid_of(dims(model.config)), 0), uniform=False)
    clock.watch(small)
    (found,) = time_models([small], REQUEST, rounds=2, doors=[layers_of(small, family)], clock=clock)
    assert len(found.prefill) == len(found.decode) == 2
    for lap in (*found.of("prefill"), *found.of("decode")):
        assert lap.layers == tuple(numel(layer) for layer in layers_of(small, family))
    assert not any(layer._forward_pre_hooks for layer in layers_of(small, family))


@pytest.mark.parametrize("n_layers", [2, 3, 4, 30])
def test_every_width_is_measured_twice_and_every_probe_fits(n_layers: int) -> None:
    grid = grid_of({"mlp": 1536, "kv_heads": 3, "q_per_kv": 3})
    probes = plan(grid, n_layers)
    alone = Counter(shape for probe in probes for shape in probe if not (shape.attends and shape.mlp))
    del alone[EMPTY]
    assert len(alone) == 9 + 24
    assert set(alone.values()) == {2}
    assert all(len(probe) <= n_layers and probe[0].attends for probe in probes)
    assert any(EMPTY in probe for probe in probes)


def test_an_empty_layer_has_nothing_left() -> None:
    for name in CONFIGS:
        model: Any = tiny(name)
        family = family_of(model.config)
        probe = (LayerShape(1, 1, 32), EMPTY, LayerShape(0, 0, 64))
        found = build(model, family, probe, grid_of(dims(model.config)))
        empty = layers_of(found, family)[1]
        block = {path for path in family.block if "->" not in family.block[path]}
        assert {path.rpartition(".")[0] for path, _ in empty.named_parameters()} == block, name


def stairs(probes: Sequence[Probe]) -> list[Laps]:
    """Milliseconds of a device that works in steps of 64 neurons, with noise that medians remove."""

    def layer(shape: LayerShape, noise: float) -> float:
        attention = 1.0 + shape.kv_heads * shape.q_per_kv if shape.attends else 0.0
        mlp = 2.0 + -(-shape.mlp // 64) if shape.mlp else 0.0
        return 0.25 + attention + mlp + noise

    def lap(probe: Probe, noise: float) -> Lap:
        return Lap(7.0 + noise, tuple(layer(shape, noise) for shape in probe))

    dense = (LayerShape(4, 2, 80),) * 4
    return [Laps([lap(p, x) for x in (0.0, 0.0, 9.0)], [lap(p, x) for x in (0.0, 5.0, 0.0)]) for p in (*probes, dense)]


def test_medians_make_the_table_and_it_is_measured_once(cache: Path) -> None:
    model: Any = tiny("llama")
    family, calls = family_of(model.config), []

    def timer(probes: Sequence[Probe]) -> list[Laps]:
        calls.append(len(probes))
        return stairs(probes)

    table = measure(model, family, REQUEST, step=16, timer=timer)
    assert table.prefill.empty == 0.25
    assert table.prefill.mlp == (3.25, 3.25, 3.25, 3.25, 4.25)
    assert table.ms(full(model.config), "decode") == 7 + 4 * (0.25 + 1 + 8 + 2 + 2)
    assert table.check == 0
    assert measure(model, family, REQUEST, step=16, timer=timer) == table
    assert len(calls) == 1
    measure(model, family, REQUEST, step=16, timer=timer, again=True)
    measure(model, family, Request(6, 2, 4), step=16, timer=timer)
    measure(model, family, REQUEST, step=32, timer=timer)
    measure(model.to(torch.bfloat16), family, REQUEST, step=16, timer=timer)
    assert len(calls) == 5
    assert len(list((cache / "latency").iterdir())) == 4


def test_interruptions_that_single_layers_forget_are_scaled_in() -> None:
    """Every forward is held up for a quarter of its layers' time, each in another layer: no median sees it."""
    model: Any = tiny("llama")

    def timer(probes: Sequence[Probe]) -> list[Laps]:
        found = []
        for laps in stairs(probes):
            clean = laps.prefill[0]
            late = [
                Lap(clean.outside, tuple(t + sum(clean.layers) / 4 * (i == k) for i, t in enumerate(clean.layers)))
                for k in range(len(clean.layers))
            ]
            found.append(Laps(late, late))
        return found

    quiet = measure(model, family_of(model.config), REQUEST, timer=stairs)
    table = measure(model, family_of(model.config), REQUEST, timer=timer, again=True)
    assert table.prefill.outside == quiet.prefill.outside
    assert table.decode.mlp == pytest.approx([1.25 * t for t in quiet.decode.mlp])
    assert (quiet.check, table.check) == (0, pytest.approx(0, abs=1e-9))


def test_a_table_of_a_busy_machine_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny("llama")

    def quiet(probes: Sequence[Probe]) -> list[Laps]:
        return [Laps(laps.prefill[:2], laps.decode[:1]) for laps in stairs(probes)]

    def busy(probes: Sequence[Probe]) -> list[Laps]:
        *laps, dense = quiet(probes)
        return [*laps, Laps([Lap(2 * lap.total) for lap in dense.prefill], dense.decode)]

    measure(model, family_of(model.config), REQUEST, timer=quiet, again=True)
    assert not caplog.text
    table = measure(model, family_of(model.config), REQUEST, timer=busy, again=True)
    assert table.check == 0.5
    assert "varied by 0 %, and for a network that it was not made from the table is off by 50 %" in caplog.text


def test_threads_are_part_of_the_key() -> None:
    model: Any = tiny("llama")
    family, grid = family_of(model.config), grid_of(dims(model.config))
    one = latency.key_of(model, family, REQUEST, grid)
    torch.set_num_threads(2)
    two = latency.key_of(model, family, REQUEST, grid)
    assert [key for key in one if one[key] != two[key]] == ["threads"]
    assert one["device"].startswith("cpu, ")
    weights = latency.key_of(tiny("llama", seed=1), family, REQUEST, grid)
    assert {**weights, "threads": 1} == one


def test_prompt_and_mean_steps_add_up_to_the_request() -> None:
    class Uneven(Counting):
        """Every second reading says that ten more have passed."""

        n = 0

        def read(self) -> list[float]:
            self.n += 1
            return [span + 10 * (self.n % 2) for span in super().read()]

    model: Any = tiny("llama")
    (found,) = time_models([model], Request(6, 2, 4), rounds=1, clock=Uneven())
    assert [lap.total for lap in found.prefill] == [0.0]  # five readings in the round that warms up, then five more
    assert [lap.total for lap in found.decode] == [5.0]
    assert found.requests(Request(6, 2, 4)) == [20.0]


def test_two_models_are_compared_in_turns() -> None:
    model: Any = tiny("llama")
    family, clock = family_of(model.config), Counting()
    small = extract(model, family, SubNetwork(48, (LayerShape(2, 1, 40),) * 4))
    for one in (model, small):
        clock.watch(one)
    original = latency.clock_of
    try:
        latency.clock_of = lambda device: clock  # type: ignore[assignment]
        found = compare(model, small, REQUEST, rounds=2)
    finally:
        latency.clock_of = original
    total = [numel(one) * (1 + REQUEST.generate) for one in (model, small)]
    assert found["dense_request_ms"] == total[0]
    assert found["request_ms"] == total[1]
    assert found["speedup"] == pytest.approx(total[0] / total[1])
    assert found["token_ms"] == found["prefill_ms"] == numel(small)


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama")
    family = family_of(model.config)
    with pytest.raises(UserError, match="65 tokens exceed the model's 64 positions"):
        measure(model, family, Request(64, 1, 0))
    monkeypatch.setattr(latency, "available", lambda device: 1000)
    with pytest.raises(UserError, match=r"not enough memory on cpu: \d+ probes"):
        measure(model, family, REQUEST)
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    with pytest.raises(UserError, match="two layers or more"):
        measure(model, family, REQUEST)


def test_the_real_clock_runs_forward() -> None:
    model: Any = tiny("qwen3")
    table = measure(model, family_of(model.config), REQUEST, rounds=2)
    for times in (table.prefill, table.decode):
        values = [times.outside, times.empty, *times.mlp, *(x for row in times.attention for x in row)]
        assert all(0 < x < 1e5 for x in values)
    assert table.request_ms(full(model.config)) > table.prefill.outside
    clock = WallClock(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    spans = clock.read()
    assert len(spans) == 2
    assert min(spans) >= 0
    assert clock.read() == []
