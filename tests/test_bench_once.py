"""What rows of a bench have in common is measured once; what they are made of stands in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_bench import config, needs_model, plan, texts
from torch import nn

from prunus import describe
from prunus.baselines import bench, shortgpt, sleb
from prunus.baselines.bench import run
from prunus.baselines.table import OURS
from prunus.evaluation import Speed, SpeedRatio, parameters
from prunus.recording.run import Run
from prunus.texts import calibration

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
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    steps = json.loads((tmp_path / "out" / "prunus" / row["calibration"] / "manifest.json").read_text())["artefacts"]
    peak = max(one["peak_bytes"] for one in steps.values() if one["step"] in bench.METHOD_STEPS)
    beside = manifest["notes"][f"beside/{row['calibration']}"]  # the bench's own model and all else that was there
    assert beside[0] > 10**8 and row["peak_bytes"] == 1e6 * row["peak_mb"] == peak - beside[0]
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


@needs_model
def test_every_row_names_the_tokens_that_it_was_calibrated_on(texts: tuple[str, str], tmp_path: Path) -> None:
    """Of a method, of ours, of one that is refused, and of rows that earlier versions wrote without."""
    asked, out = plan(texts, "magnitude", OURS, "mask-wanda-2:4", keeps=(0.8,)), tmp_path / "out"
    found = run(config(texts[0]), asked, out)
    tokens = load_file(out / "prunus" / "calibration.txt" / "tokens.safetensors")["calibration"]
    want = [calibration.token_hash(tokens)] * 3
    assert [row.get("token_hash") for row in found["rows"]] == [None, *want]
    row = json.loads((out / "rows" / "calibration.txt" / "prunus-0.8.json").read_text())
    assert row["token_hash"] == want[0]
    there = [{"method": "flap", "calibration": c, "kept": 0.5} for c in ("calibration.txt", "another.txt")]
    with Run.reopen(out, steps=bench.STEPS) as record:
        told = bench.everything(record, [{**one, "refused": "no"} for one in there])
    assert {row["calibration"]: row.get("token_hash") for row in told if row["method"] == "flap"} == {
        "calibration.txt": want[0], "another.txt": None,
    }  # fmt: skip


def test_the_dense_model_decodes_what_it_did_beside_the_networks_of_its_machine() -> None:
    def timed(decode: float, machine: str = "m", **more: Any) -> dict[str, Any]:
        return {"method": "flap", "machine": machine, "speed": {"dense": {"decode": decode}}, **more}

    dense = {"method": "dense", "machine": "m"}
    rows = [dense, timed(1.0), timed(5.0), timed(7.0), timed(90.0, "n"), timed(1.0, timed_with="flap, 80%")]
    assert bench._decoded(dense, rows) == {"decoded": 5.0}
    assert bench._decoded(rows[1], rows) == bench._decoded(dense, [dense]) == {}
