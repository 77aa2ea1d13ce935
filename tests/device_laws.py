"""Whatever computes does it on the device of the model: no tensor of the CPU gets between.

The device is the one of `faraway.py`; `test_device.py` runs this file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import words
from faraway import Far, faraway
from tiny import ragged, tiny, tokens

from prunus.config import resolve
from prunus.models.families import family_of
from prunus.models.slicing import activate, extract, sort
from prunus.pipeline import compress
from prunus.scoring import importance, moments

# ------------------------------------------------------------------------------------------------ the device itself


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    near, own = torch.arange(6.0).view(2, 3), torch.Generator()
    with faraway() as device:
        far = near.to(device)
        assert isinstance(far, Far) and far.device == device and (far @ far.T + 1.0).device == device
        assert torch.equal((far * 2).cpu(), near * 2) and far[[1], :2].tolist() == [[3.0, 4.0]]
        assert torch.equal(far[torch.tensor([1])].cpu(), near[[1]])  # the index may be of the CPU
        for mixed in (
            lambda: far + near,
            lambda: torch.cat([far, near]),
            lambda: near[torch.ones(2, dtype=torch.bool, device=device)],
            lambda: torch.nn.Linear(3, 2)(far),
            lambda: torch.randn(2, device=device, generator=own),
        ):
            with pytest.raises((RuntimeError, AssertionError)):
                mixed()
        layer = torch.nn.Linear(3, 2).to(device)
        layer(far).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.device == device


# ---------------------------------------------------------------------------------------------------------- the laws


def figures(name: str, device: str | torch.device) -> dict[str, torch.Tensor]:
    """What is computed of a tiny model: scores, curvature, a sorted one's sub-network as view and as copy."""
    model, ids = tiny(name).to(device), tokens().to(device)
    family = family_of(model.config)
    found = importance.score(model, family, ids)
    curvature = moments.fisher(model, family, ids)
    sort(model, family, found.order())
    sub = ragged(model.config)
    with torch.no_grad(), activate(model, family, sub):
        view = model(ids).logits
    copy = extract(model, family, sub)(ids).logits.detach()
    assert view.device == copy.device == ids.device
    return {"mlp": found.mlp, "attention curvature": curvature[0], "view": view.cpu(), "copy": copy.cpu()}


# one of each kind: MQA with biases, norms of heads, soft caps, fused matrices, parallel blocks, positions, Conv1D
@pytest.mark.parametrize("name", ["llama-mqa-tied-bias", "qwen3", "gemma3", "phi3", "gpt_neox", "opt", "gpt2"])
def test_every_family_is_scored_sorted_and_cut_on_its_device(name: str) -> None:
    here = figures(name, "cpu")
    with faraway() as device:
        there = figures(name, device)
    for key in ("mlp", "view", "copy"):  # the labels of the curvature are drawn by the device's own generator
        torch.testing.assert_close(there[key].cpu(), here[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_a_run_trains_searches_and_evaluates_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of `compress`, with a training and a front, against a training on the CPU."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "far:0")
    model = words.checkpoint(words.tiny("llama", num_hidden_layers=2), tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th other one is at the end of it, and {i % 7} are not. " for i in range(400)))
    asked: dict[str, Any] = {
        "model": model, "keep": (0.6,), "dtype": "float32", "calibration.source": str(text), "calibration.samples": 6,
        "calibration.length": 48, "calibration.holdout": 4, "search.mlp_step": 16, "train.data": str(text),
        "train.length": 32, "train.steps": 2, "train.batch": 2, "train.bins": 2, "train.draws": 2, "train.holdout": 2,
        "train.precision": "float32", "train.rank": 2, "search.generations": 0,
    }  # fmt: skip
    front = {"front.objectives": "kl,bytes", "front.evaluations": 4, "front.population": 2, "search.generations": 1}
    with faraway():
        there = compress(resolve(None, {**asked, **front, "device": "far"}), tmp_path / "far")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    compress(resolve(None, {**asked, "device": "cpu"}), tmp_path / "cpu")
    losses = [json.loads((tmp_path / run / "manifest.json").read_text())["notes"]["train"] for run in ("far", "cpu")]
    for far, cpu in zip(losses[0]["held_out"], losses[1]["held_out"], strict=True):
        assert far["eval_loss"] == pytest.approx(cpu["eval_loss"], rel=1e-3)
    assert math.isfinite(there["chosen"][0]["kl_nats"]) and there["chosen"][0]["kept_blocks"] <= 0.6
