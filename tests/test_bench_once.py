"""What rows of a bench have in common is measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_bench import config, needs_model, plan, texts
from torch import nn

from prunus import describe
from prunus.baselines import bench, shortgpt, sleb
from prunus.baselines.bench import run
from prunus.evaluation import Speed, SpeedRatio, parameters

__all__ = ["texts"]  # a fixture


@needs_model
def test_networks_of_the_same_shapes_are_timed_once(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def compare_speed(dense: nn.Module, small: nn.Module, **_: int) -> SpeedRatio:
        timed.append(parameters(small)["all"])
        ratio = float(len(timed))
        return SpeedRatio(ratio, ratio, Speed(1.0, 1.0), Speed(ratio, ratio))

    monkeypatch.setattr(describe, "compare_speed", compare_speed)
    asked = plan(texts, "shortgpt", "flap", speed=True, keeps=(0.8,))
    run(config(texts[0]), asked, tmp_path / "out")
    assert len(timed) == 2  # other shapes
    asked = plan(texts, "shortgpt", "flap", "sleb", speed=True, keeps=(0.8,))
    found = run(config(texts[0]), asked, tmp_path / "out")["rows"]  # an earlier command's measurements serve too
    speeds = {row["method"]: (row["prefill_speedup"], row.get("timed_with")) for row in found[1:]}
    assert speeds == {"shortgpt": (1.0, None), "flap": (2.0, None), "sleb": (1.0, "shortgpt, 80%")}
    assert "Speeds of 1 rows are those of an earlier network" in (tmp_path / "out" / "bench.md").read_text()


@needs_model
def test_a_network_of_ours_is_timed_by_its_run(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def compare_speed(dense: nn.Module, small: nn.Module, **_: int) -> SpeedRatio:
        timed.append(parameters(small)["all"])
        return SpeedRatio(1.5, 1.25, Speed(1.0, 2.0), Speed(1.5, 2.5))

    monkeypatch.setattr(describe, "compare_speed", compare_speed)
    asked = plan(texts, "prunus", speed=True, keeps=(0.8,))
    row = run(config(texts[0]), asked, tmp_path / "out")["rows"][1]
    assert timed == [row["parameters"]]
    assert (row["prefill_speedup"], row["decode_speedup"], row["decoded"]) == (1.5, 1.25, 2.5)
    monkeypatch.setattr(bench, "words", lambda: "another machine")
    (tmp_path / "out" / "rows" / row["calibration"] / "prunus-0.8.json").unlink()
    again = run(config(texts[0]), asked, tmp_path / "out")["rows"][1]
    assert timed == [row["parameters"]] * 2 and again["machine"] == "another machine"


@needs_model
def test_two_methods_that_end_at_one_network_have_it_measured_once(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    own = bench.perplexity

    def counted(model: nn.Module, *args: Any, **given: Any) -> Any:
        scored.append(parameters(model)["all"])
        return own(model, *args, **given)

    monkeypatch.setattr(bench, "perplexity", counted)
    monkeypatch.setattr(sleb, "compress", shortgpt.compress)
    found = run(config(texts[0]), plan(texts, "shortgpt", "sleb", "magnitude", keeps=(0.8,)), tmp_path / "out")
    dense, other, first, same = found["rows"]
    assert len(scored) == 3 * 2  # lengths
    assert same["measured_with"] == "shortgpt, 80%" and same["perplexity"] == first["perplexity"]
    assert same["ppl64"] == first["ppl64"] and same["method"] == "sleb"
    assert other["fingerprint"] not in (first["fingerprint"], dense["fingerprint"])
