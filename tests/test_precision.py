"""Types of numbers: stored as they are asked for, computed in a type that the processor multiplies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny, tokens
from transformers import AutoModelForCausalLM

from prunus.config import CompressConfig, resolve
from prunus.evaluation import evaluate
from prunus.inspection import inspect_model
from prunus.models import loading, memory, precision
from prunus.picking import pick
from prunus.pipeline import compress

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "stories260k-hf"
TEXT = SHARED / "tinystories" / "tinystories_part.txt"
needs_data = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the tiny trained model of the data beside the project"
)


@pytest.fixture(params=[True, False], ids=["multiplied", "not multiplied"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor that multiplies 16-bit numbers, and one that does not."""
    monkeypatch.setattr(precision, "multiplies", lambda dtype, device: dtype == torch.float32 or request.param)
    return bool(request.param)


def test_what_a_device_multiplies_is_asked_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        _is_mkldnn_bf16_supported = staticmethod(lambda: True)

    for library, expected in ((Library(), [True, False]), (object(), [False, False])):
        monkeypatch.setattr(torch.ops, "mkldnn", library)
        assert [precision.multiplies(t, "cpu") for t in (torch.bfloat16, torch.float16)] == expected
        assert precision.multiplies(torch.float32, "cpu") and precision.multiplies(torch.bfloat16, "cuda:1")
    assert precision.computing(torch.float16, "cpu") == torch.float32


def test_cast_leaves_the_frequencies_of_rope_alone() -> None:
    model: Any = tiny("llama")
    before = model(tokens()).logits.detach()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with precision.stored(model, torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    after = model(tokens()).logits.detach()
    assert not torch.equal(after, before)  # rounded
    assert torch.allclose(after, before, atol=0.02 * float(before.abs().max()))


def config(**changes: Any) -> CompressConfig:
    quick = {
        "model": str(MODEL), "keep": (0.6,), "dtype": "bfloat16", "calibration.source": str(TEXT),
        "calibration.samples": 16, "calibration.length": 96, "calibration.holdout": 6, "search.mlp_step": 8,
        "search.generations": 0,
    }  # fmt: skip
    return resolve(None, {**quick, **{key.replace("__", "."): value for key, value in changes.items()}})


@needs_data
@pytest.mark.parametrize(
    ("method", "fast"),
    [("prunus", True), ("prunus", False), ("slicegpt", False), ("trained", False)],
    indirect=["fast"],
)
def test_checkpoints_are_written_as_asked_and_measured_as_written(method: str, fast: bool, tmp_path: Path) -> None:
    short = {"length": 64, "batch": 4, "steps": 3, "holdout": 0, "bins": 3, "draws": 2, "data": str(TEXT)}
    trained = {f"train__{key}": value for key, value in short.items()}
    out, changes = tmp_path / "run", trained if method == "trained" else {"method": method}
    (tmp_path / "held.txt").write_text(TEXT.read_text()[-4000:])
    asked = {"test_text": str(tmp_path / "held.txt"), "test_length": 64, "test_chunks": 12}
    data = compress(config(**changes, **asked), out)
    (network,) = data["chosen"]
    path = out / network["path"]
    small: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert small.config.dtype == torch.bfloat16
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert network["n_bytes"] == 2 * sum(p.numel() for p in small.parameters())
    loaded = loading.load(str(path), compress=False)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.dtype == (torch.bfloat16 if fast else torch.float32)
    assert data.get("types") == (None if fast else {"stored": "bfloat16", "computed": "float32"})
    assert ('dtype="float32")' in (out / "report.md").read_text()) is not fast
    assert '`dtype="float32"` is many times faster' in (path / "README.md").read_text()
    if method == "slicegpt" or fast:  # rivals' weights are rounded after they were measured
        return
    again = evaluate(loaded.model, loaded.tokenizer, str(tmp_path / "held.txt"), length=64, chunks=12)
    (measured,) = network["perplexity"].values()
    assert again["ppl"] == pytest.approx(measured, rel=1e-5)


@needs_data
@pytest.mark.parametrize("fast", [False], indirect=True)
def test_a_pick_is_written_as_its_run_is(fast: bool, tmp_path: Path) -> None:
    compress(config(), tmp_path / "run")
    pick(tmp_path / "run", 0.7)
    pick(tmp_path / "run", 0.7, out=tmp_path / "elsewhere")
    for path in (tmp_path / "run" / "models" / "pick-0.7", tmp_path / "elsewhere"):
        assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"


@needs_data
def test_the_type_is_said_where_it_is_another_one(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "LARGE", 1)
    found = inspect_model(config())
    assert found["dtype"] == "bfloat16"
    assert found.get("computes in") == (None if fast else "float32")
    assert found["weights_bytes"] == 2 * found["parameters"]
    loaded = loading.load_configured(config())
    with caplog.at_level("INFO", logger="prunus"):
        loading.say_type(loaded.model, loaded.dtype, "bfloat16")
    assert ("this processor has no products of bfloat16 numbers" in caplog.text) is not fast


def test_memory_is_asked_for_in_the_type_that_computes(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(loading, "refuse_too_large", lambda config, dtype, *more: asked.append(dtype))
    model = tiny("llama")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(Exception, match="tokenizer"):
        loading.load(str(tmp_path), dtype="float16")
    assert asked == [torch.float16 if fast else torch.float32]
    assert memory.multiplies(torch.float32, "cpu")
