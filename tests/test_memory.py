"""What a model and the work on it need is known before it is read, step by step, and what does not fit is refused."""

from __future__ import annotations

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
from prunus.models.memory import NOTHING, Work, memory_needs


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
    assert set(memory_needs(model.config, torch.float32, Work(8, 64, True, 8, 0.5))) == {
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
        load(source, work=Work(4000, 1024, sequential=4000, keep=0.8))
    with pytest.raises(UserError, match=r"GB for the step score.*fewer or shorter.*reform.fisher=0"):
        load(source, work=Work(4000, 1024, curvature=True))


def test_the_work_is_what_the_settings_say() -> None:
    assert Work.of(CompressConfig(model="x", keep=(0.5, 0.8))) == Work(80, 1024, True, 64, 0.8)
    assert Work.of(CompressConfig(model="x", method="flap", keep=(0.5,))) == Work(80, 1024, keep=0.5)
    few = {"model": "x", "reform.sequential_samples": 16, "reform.fisher": 0, "budget.speedup": [1.5]}
    assert Work.of(CompressConfig.from_dict(few)) == Work(80, 1024, False, 16, 1.0)
    off = CompressConfig.from_dict({"model": "x", "reform.sequential": False})
    assert Work.of(off).sequential == 0


def test_every_step_has_its_need() -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
    )
    work = Work(80, 1024, True, 64, 0.8)
    one = 4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256  # parameters of a layer

    def needs(**changed: Any) -> dict[str, int]:
        return memory_needs(config, torch.float32, replace(work, **changed))

    full = needs()
    assert memory_needs(config, torch.float32, NOTHING) == {}
    assert list(full) == ["score", "reform", "search", "extract", "evaluate"]
    assert needs(samples=640)["score"] - full["score"] == 4 * 560 * 1024 * 256  # float32 states of their tokens
    assert full["reform"] - full["search"] == 2 * 4 * 4 * 256**2 - 2 * 4 * 4 * one  # the curvature; cached writers
    assert full["extract"] - needs(sequential=32)["extract"] == 32 * 1024 * (8 * 256 + 4 * (6 * 256 + 1024))
    assert full["evaluate"] - needs(keep=0.3)["evaluate"] == pytest.approx(2 * 4 * 0.5 * 4 * one, abs=8)
    assert "extract" not in needs(sequential=0)
    assert "reform" not in needs(curvature=False)


def test_available_memory_is_plausible() -> None:
    found = memory.available()
    assert found is None or 2**20 < found < 2**50
