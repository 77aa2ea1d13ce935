"""What a model and the work on it need is known before it is read, step by step, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import tokenizer
from tiny import CONFIGS, tiny
from transformers import LlamaConfig

from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.models import memory, precision
from prunus.models.loading import load
from prunus.models.memory import Work, memory_needs
from prunus.pipeline import _left
from prunus.recording.run import FORMAT
from prunus.training.learning import TrainConfig


@pytest.fixture
def source(tmp_path: Path) -> str:
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda n: monkeypatch.setattr(memory, "available", lambda device: n)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameters_are_counted_without_a_model(name: str) -> None:
    model = tiny(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert memory.parameter_count(model.config) == count
    assert memory.memory_need(model.config, torch.bfloat16) == 2 * count
    assert set(memory_needs(model.config, torch.float32, Work(8, 64, True, True, 8, 0.5))) == {
        "score", "reform", "search", "extract", "evaluate"
    }  # fmt: skip


def test_too_little_memory_is_said_before_loading(
    source: str, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = memory.memory_need(load(source).model.config, torch.float32)
    monkeypatch.setattr(precision, "multiplies", lambda dtype, device: True)
    monkeypatch.setattr(memory, "multiplies", lambda dtype, device: True)
    free(need - 1)
    with pytest.raises(UserError, match=r"not enough memory on cpu.*largest that fits.*--dtype bfloat16"):
        load(source)
    load(source, dtype="bfloat16")
    free(need)
    load(source)


def test_the_step_that_needs_too_much_is_named(source: str, free: Callable[[int], None]) -> None:
    free(50_000_000)
    load(source)
    with pytest.raises(UserError, match=r"GB for the step extract.*fewer or shorter.*reform.sequential=false"):
        load(source, work=Work(4000, 1024, sequential=4000, keep=0.8, steps=("search", "extract")))
    with pytest.raises(UserError, match=r"GB for the step score.*fewer or shorter.*reform.fisher=0"):
        load(source, work=Work(4000, 1024, curvature=True, steps=("score",)))
    long = TrainConfig(data="rows.jsonl", length=200_000)
    with pytest.raises(UserError, match=r"step train.*--micro-batch or --window.*checkpointing.*--rank"):
        load(source, work=Work(8, 64, train=long, steps=("train",)))


def test_the_work_is_what_the_settings_say() -> None:
    assert Work.of(CompressConfig(model="x", keep=(0.5, 0.8))) == Work(80, 1024, True, True, 64, 0.8)
    rival = CompressConfig(model="x", method="flap", keep=(0.5,))
    assert Work.of(rival) == Work(80, 1024, ours=False, keep=0.5)
    few = {"model": "x", "reform.sequential_samples": 16, "reform.fisher": 0, "budget.speedup": [1.5]}
    assert Work.of(CompressConfig.from_dict(few)) == Work(80, 1024, True, False, 16, 1.0)
    off = CompressConfig.from_dict({"model": "x", "reform.sequential": False, "train.data": "rows.jsonl"})
    assert Work.of(off).sequential == 0
    assert Work.of(off).train == off.train


def needs(**changed: Any) -> dict[str, int]:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    return memory_needs(config, torch.float32, replace(Work(80, 1024, True, True, 64, 0.8), **changed))


def close(bytes: float) -> Any:
    return pytest.approx(memory.MARGIN * bytes, abs=8)


def test_every_step_has_its_need() -> None:
    layer, full = 4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256, needs()  # parameters of a layer
    writers = 4 * 4 * 0.8 * 256 * (256 + 1024)  # bytes of those of a network
    assert list(full) == ["score", "reform", "search", "extract", "evaluate"]
    assert needs(samples=640)["score"] - full["score"] == close(4 * 560 * 1024 * 256)  # float32 states of their tokens
    assert full["search"] - full["reform"] == close(2 * writers - 2 * 4 * 4 * 256**2)  # in exchange for the curvature
    states = 32 * 1024 * (8 * 256 + 4 * (6 * 256 + 1024))
    assert full["extract"] - needs(sequential=32)["extract"] == close(states)
    assert full["evaluate"] - needs(keep=0.3)["evaluate"] == close(2 * 4 * 0.5 * 4 * layer)
    assert "extract" not in needs(sequential=0)
    assert full["reform"] - needs(curvature=False)["reform"] == close(2 * 4 * 4 * 256**2)
    assert list(needs(steps=("search",))) == ["search"]
    weights = 4 * (4 * layer + 2 * 512 * 256 + 256)
    assert needs(beside=1)["search"] == full["search"] + weights
    assert list(needs(ours=False, sequential=0)) == ["evaluate"]


def test_a_training_needs_its_optimiser() -> None:
    config = CompressConfig.from_dict({"model": "x", "train.data": "rows.jsonl"}).train
    weights = 4 * (4 * (4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256) + 2 * 512 * 256 + 256)
    whole, adapters = needs(train=config)["train"], needs(train=replace(config, rank=8))["train"]
    assert whole > memory.MARGIN * 3 * weights  # gradients and two moments in float32
    assert adapters < whole - memory.MARGIN * 2 * weights
    assert needs(train=replace(config, teacher="dense"))["train"] == close((whole / memory.MARGIN) + weights)
    assert needs(train=replace(config, checkpointing=True))["train"] < whole


def test_what_is_done_needs_nothing(tmp_path: Path) -> None:
    config = CompressConfig(model="x", keep=(0.5,))
    rest = ("score", "train", "reform", "search", "extract", "evaluate")
    assert _left(config, tmp_path, "report", False) == rest
    assert _left(config, tmp_path, "reform", False) == rest[:3]
    files = ["importance.safetensors", "supernet", "errors.safetensors", "search/keep-0.5.json",
             "weights/keep-0.5.safetensors", "evaluation/keep-0.5.json", "models/keep-0.5"]  # fmt: skip
    manifest: dict[str, Any] = {
        "prunus_run": FORMAT,
        "artefacts": {file: {} for file in files},
        "config": config.to_dict(),
    }

    def left(config: CompressConfig, last: Any, anew: bool = False) -> tuple[str, ...]:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return _left(config, tmp_path, last, anew)

    assert left(config, "report") == ()
    assert left(config, "search", True) == ("search",)
    assert left(config, "extract", True) == ("extract", "evaluate")
    assert left(replace(config, test_text="t.txt"), "report") == ("evaluate",)
    assert left(replace(config, keep=(0.5, 0.4)), "report") == ("search", "extract", "evaluate")
    manifest["artefacts"]["errors.safetensors"] = {"stale": True}
    assert left(config, "report") == ("reform",)


def test_available_memory_is_plausible() -> None:
    found = memory.available()
    assert found is None or 2**20 < found < 2**50


def test_a_container_without_page_cache_is_what_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"memory.max": "1000", "memory.current": "700", "memory.stat": "active_file 100\ninactive_file 200\n"}
    old = {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "500",
           "memory.stat": "total_active_file 0\ntotal_inactive_file 50\n"}  # fmt: skip
    for folder, content in (("two", files), ("one", old)):
        (tmp_path / folder).mkdir()
        for name, text in content.items():
            (tmp_path / folder / name).write_text(text)
    places = {"/sys/fs/cgroup": tmp_path / "two", "/sys/fs/cgroup/memory": tmp_path / "one"}
    monkeypatch.setattr(memory, "Path", lambda path: places.get(path, Path(path)))
    assert list(memory._containers()) == [(1000, 400), (900, 450)]
    assert memory.available() == 450
    (tmp_path / "one" / "memory.limit_in_bytes").write_text("max")
    assert memory.available() == 600
