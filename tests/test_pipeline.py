"""The whole method on a really trained tiny model: checkpoints that load and beat the control; resume; every search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hurry import painted
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus import finishing
from prunus.config import KEEP, CompressConfig, resolve
from prunus.errors import UserError
from prunus.exporting import llamacpp
from prunus.exporting.export import export
from prunus.models import loading
from prunus.picking import pick
from prunus.pipeline import compress, step
from prunus.recording.run import Run
from prunus.reforming import sequential
from prunus.timing.latency import Lap, Laps
from prunus.timing.timetable import Request

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "stories260k-hf"
TEXT = SHARED / "tinystories" / "tinystories_part.txt"
pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the tiny trained model of the data beside the project"
)


def config(**changes: Any) -> CompressConfig:
    quick = {
        "model": str(MODEL),
        "keep": (0.8, 0.6),
        "calibration.source": str(TEXT),
        "calibration.samples": 24,
        "calibration.length": 128,
        "calibration.holdout": 8,
        "search.mlp_step": 8,
        "search.generations": 2,
        "search.offspring": 4,
    }
    return resolve(None, {**quick, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "levels"
    with painted():
        return out, compress(config(), out)


def logits(path: Path, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, **options).eval()(ids).logits  # type: ignore[no-any-return]


def test_checkpoints_are_smaller_load_and_stay_close(run: tuple[Path, dict[str, Any]]) -> None:
    out, result = run
    kept = [found["kept_blocks"] for found in result["chosen"]]
    assert kept[0] == pytest.approx(0.8, abs=0.004)
    assert kept[1] == pytest.approx(0.6, abs=0.004)
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text()[:400], return_tensors="pt").input_ids
    dense = logits(MODEL, ids).log_softmax(-1)
    for found in result["chosen"]:
        path = out / "models" / found["name"]
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        assert sum(p.numel() for p in model.parameters()) == found["parameters"]
        small = logits(path, ids, trust_remote_code=True).log_softmax(-1)
        kl = float((dense.exp() * (dense - small)).sum(-1).mean())
        assert 0 < kl < 2 * found["kl_nats"] < 4  # far from a collapse: dense against uniform is some 4.8
        text = AutoTokenizer.from_pretrained(path).decode(model.generate(ids[:, :8], max_new_tokens=8)[0])
        assert len(text) > 8
    assert (out / "report.md").is_file()
    assert (out / "report" / "front.png").stat().st_size > 10_000


def test_the_method_beats_plain_slicing_and_random_allocation(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    ours = {n["name"]: n["kl_nats"] for n in run[1]["chosen"]}
    plain = compress(config(reform__method="none", keep=(0.6,)), tmp_path / "plain")
    control = compress(config(search__method="random", keep=(0.6,)), tmp_path / "random")
    assert ours["keep-0.6"] < 0.8 * plain["chosen"][0]["kl_nats"]
    assert ours["keep-0.6"] < control["chosen"][0]["kl_nats"]


def test_networks_that_no_memory_holds_together_are_refitted_one_by_one(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, own = [], sequential.refit_all
    monkeypatch.setattr(finishing.memory, "available", lambda device: 1)

    def counted(stream: Any, ids: Any, candidates: Any, *args: Any, **options: Any) -> Any:
        seen.append(len(candidates))
        return own(stream, ids, candidates, *args, **options)

    monkeypatch.setattr(sequential, "refit_all", counted)
    monkeypatch.setattr("prunus.models.loading.refuse_too_large", lambda *args, **options: None)
    compress(config(), tmp_path / "run")
    assert seen == [1, 1]
    for name in ("keep-0.8", "keep-0.6"):
        first, second = (load_file(out / "weights" / f"{name}.safetensors") for out in (run[0], tmp_path / "run"))
        assert first.keys() == second.keys() and all(torch.equal(w, second[key]) for key, w in first.items())


def test_a_text_that_cannot_be_scored_is_refused_at_once(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    for text, length, words in (
        (short, 64, "too short"),
        (TEXT, 100_000, "positions"),
        (tmp_path / "none.txt", 64, r"none\.txt"),
    ):
        with pytest.raises(UserError, match=words):
            compress(config(test_text=str(text), test_length=length), tmp_path / "run")
    with pytest.raises(UserError, match="positions"):
        compress(config(calibration__length=100_000), tmp_path / "run")
    assert not (tmp_path / "run" / "tokens.safetensors").exists()
    copy = tmp_path / "held.txt"
    copy.write_text("Another beginning. " + Path(TEXT).read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"of the calibration text stands in the test text .*held\.txt"):
        compress(config(test_text=str(copy), test_length=64), tmp_path / "run")
    assert not (tmp_path / "run" / "importance.safetensors").exists()


def test_the_same_command_again_computes_nothing(run: tuple[Path, dict[str, Any]]) -> None:
    out, first = run
    before = json.loads((out / "manifest.json").read_text())["artefacts"]
    again = compress(config(), out)
    after = json.loads((out / "manifest.json").read_text())["artefacts"]
    assert before == after
    assert again["chosen"] == first["chosen"]


def test_more_ratios_may_be_asked_of_the_same_run(run: tuple[Path, dict[str, Any]]) -> None:
    out, first = run
    more = compress(config(keep=(0.8, 0.6, 0.5)), out)
    assert [n["name"] for n in more["chosen"]] == ["keep-0.8", "keep-0.6", "keep-0.5"]
    assert more["chosen"][:2] == first["chosen"]


def test_another_configuration_is_refused_by_name(run: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"reform\.damping"):
        compress(config(keep=(0.8, 0.6, 0.5), reform__damping=0.1), run[0])


def test_float32_is_pointed_out_where_a_large_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def said(out: str, **changes: Any) -> bool:
        caplog.clear()
        with caplog.at_level("INFO", logger="prunus"):
            compress(config(method="magnitude", keep=(0.8,), **changes), tmp_path / out)
        return "--dtype bfloat16" in caplog.text

    assert not said("small")
    monkeypatch.setattr("prunus.models.loading.LARGE", 1)
    assert said("large")
    assert not said("large")  # goes on with what is there, whose type is settled
    assert not said("chosen", dtype="float32")


@pytest.mark.parametrize("keep", [0.008, 0.0005])
def test_a_share_out_of_reach_is_refused_before_any_work(keep: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of reach"):
        compress(config(keep=(keep,)), tmp_path / "run")
    assert not (tmp_path / "run" / "tokens.safetensors").exists()


def budget(**asked: Any) -> CompressConfig:
    """A budget instead of shares; names without a section are its own."""
    own = {"prompt": 32, "generate": 8, **asked}
    return config(keep=(), **{k if "__" in k or k == "uniform" else f"budget__{k}": v for k, v in own.items()})


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that takes a millisecond for 10,000 parameters of a layer, and a tenth of one for its frame."""

    def time_models(models: Sequence[Any], request: Request, **given: Any) -> list[Laps]:
        def lap(layers: Any) -> Lap:
            return Lap(2.0, tuple(0.1 + sum(p.numel() for p in layer.parameters()) / 1e4 for layer in layers))

        return [Laps([lap(model.model.layers)], [lap(model.model.layers)]) for model in models]

    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("prunus.timing.latency.time_models", time_models)
    return tmp_path / "cache"


def test_a_speed_is_a_target(counted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = compress(budget(speedup="1.3 1.8"), out)
    dense = result["dense"]
    assert [n["name"] for n in result["chosen"]] == ["speedup-1.3", "speedup-1.8"]
    for found, wanted in zip(result["chosen"], (1.3, 1.8), strict=True):
        assert wanted <= found["predicted_speedup"] < 1.01 * wanted
        assert found["predicted_ms"] == pytest.approx(dense["predicted_ms"] / found["predicted_speedup"])
        assert found["measured_speedup"] == pytest.approx(found["predicted_speedup"])
        assert (out / "models" / found["name"] / "config.json").is_file()
    kl = [n["kl_nats"] for n in result["chosen"]]
    assert 0 < kl[0] < kl[1]
    assert "Quality against time" in (out / "report.md").read_text()
    assert (out / "report" / "staircase.svg").is_file()
    for path in counted.rglob("*.json"):
        path.unlink()  # the run goes by its own table
    before = json.loads((out / "manifest.json").read_text())["artefacts"]
    again = compress(budget(speedup="1.3 1.8 1.5"), out)
    assert [n["name"] for n in again["chosen"]] == ["speedup-1.3", "speedup-1.5", "speedup-1.8"]
    after = json.loads((out / "manifest.json").read_text())["artefacts"]
    assert after["latency.json"] == before["latency.json"]
    assert not list(counted.rglob("*.json"))


def test_other_searches_and_uniform_networks_keep_to_milliseconds(counted: Path, tmp_path: Path) -> None:
    dense = compress(budget(speedup=1.2, search__generations=0), tmp_path / "first")["dense"]
    limit = 0.7 * dense["predicted_ms"]
    shen = {"search__method": "shen", "search__population": 6}
    for name, changes in (("uniform", {"uniform": True}), ("shen", shen)):
        result = compress(budget(latency_ms=limit, **changes), tmp_path / name)
        (found,) = result["chosen"]
        assert 0.9 * limit < found["predicted_ms"] <= limit * (1 + 1e-9)


def test_decoding_speed_and_memory_are_targets(counted: Path, tmp_path: Path) -> None:
    first = compress(budget(memory_mb=0.8, context=64, batch=3), tmp_path / "memory")
    (found,) = first["chosen"]
    assert found["name"] == "memory-0.8mb"
    assert 0.79e6 < found["memory_bytes"] <= 0.8e6
    cache = sum(2 * kv * 8 * 64 * 3 * 4 for kv, q, _ in found["layers"] if q)  # heads of 8, float32
    assert found["memory_bytes"] == found["n_bytes"] + cache
    result = compress(budget(tokens_per_second=150), tmp_path / "rate")
    assert 150 <= result["chosen"][0]["predicted_tps"] < 152


def test_speed_in_llama_cpp_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are really written; what they take is their size, so that the law can be checked."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llamacpp, "installed", lambda: "0")

    def by_size(paths: Sequence[Path], request: Request, *, rounds: int, threads: int) -> Any:
        row = np.array([path.stat().st_size / 1e4 for path in paths])
        return np.tile(row, (rounds, 1)), np.tile(row / 10, (rounds, 1))

    monkeypatch.setattr(llamacpp, "timed", by_size)
    asked = budget(speedup="1.4", runtime="llama.cpp", quant="f16", prompt=64, batch=1, generate=8)
    result = compress(asked, tmp_path / "run")
    (found,) = result["chosen"]
    assert 1.4 <= found["predicted_speedup"] < 1.41
    assert found["measured_speedup"] == pytest.approx(found["predicted_speedup"], rel=0.03)  # headers have a size too
    table = json.loads((tmp_path / "run" / "latency.json").read_text())
    assert table["key"]["runtime"] == "llama.cpp" and table["key"]["dtype"] == "f16"
    assert table["check"] < 0.03
    assert compress(asked, tmp_path / "run")["chosen"] == result["chosen"]


def test_a_search_that_keeps_to_what_vllm_can_hold(tmp_path: Path) -> None:
    result = compress(config(search__attention="whole", keep=(0.7, 0.5)), tmp_path / "run")
    for found in result["chosen"]:
        assert {(kv, q) for kv, q, _ in map(shape_of, found["layers"])} <= {(4, 2), (0, 0)}
        done = export(str(tmp_path / "run" / "models" / found["name"]), format="vllm")
        assert done["architecture"] == "DeciLMForCausalLM"


def shape_of(layer: Any) -> tuple[int, int, int]:
    return (layer["kv_heads"], layer["q_per_kv"], layer["mlp"]) if isinstance(layer, dict) else tuple(layer)  # type: ignore[return-value]


def test_a_share_may_be_picked_from_a_run_with_a_budget(tmp_path: Path) -> None:
    compress(budget(memory_mb="0.9 0.8", context=64, batch=1, search__generations=0), tmp_path / "run")
    found = pick(tmp_path / "run", 0.7)
    assert found["chosen"][0]["kept_blocks"] == pytest.approx(0.7, abs=0.004)
    assert Path(found["picked"]).name == "pick-0.7"
    other = pick(tmp_path / "run", 0.7, keep_of="all")
    assert other["chosen"][0]["kept_all"] == pytest.approx(0.7, abs=0.004)
    assert Path(other["picked"]).name == "pick-0.7-of-all"


@pytest.mark.parametrize(
    ("text", "changes", "sentence"),
    [
        (None, {}, "cannot read the text file"),
        (b"", {}, "is empty"),
        (b"a few words", {}, "too short"),
        (b"a\0b", {}, "is a binary file"),
        (b"words " * 99, {"calibration__column": "text"}, "in .jsonl files only"),
        (b"words " * 99, {"calibration__source": "notes"}, "unknown calibration source"),
        (b"words " * 99, {"calibration__source": "wiki.test.raw"}, "is named as test text"),
        (b"words " * 99, {"method": "magnitude"}, "too short"),
        (b"words " * 99, {"keep": (0.001,)}, "out of reach"),
    ],
)
def test_what_is_refused_leaves_no_directory(
    text: bytes | None, changes: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunus.timing.runtimes.measure", lambda *_, **__: pytest.fail("measured before the text"))
    source, out = tmp_path / "text.txt", tmp_path / "deep" / "run"
    if text is not None:
        source.write_bytes(text)
    asked = config(**{"calibration__source": str(source), **changes})
    with pytest.raises(UserError, match=sentence):
        compress(asked, out)
    assert not (tmp_path / "deep").exists()
    out.mkdir(parents=True)
    with pytest.raises(UserError, match=sentence):
        compress(asked, out)
    assert list(out.iterdir()) == []  # it was there before


def test_a_text_is_refused_before_a_table_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunus.timing.runtimes.measure", lambda *_, **__: pytest.fail("measured before the text"))
    with pytest.raises(UserError, match="cannot read the text file"):
        compress(budget(speedup="1.3", calibration__source=str(tmp_path / "none.txt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_something_stays_when_a_later_command_is_refused(run: tuple[Path, dict[str, Any]]) -> None:
    before = sorted(path for path in run[0].rglob("*") if ".prunus" not in path.parts)
    with pytest.raises(UserError, match="another configuration"):
        compress(config(seed=1), run[0])
    recorded, keep = (run[0] / "manifest.json").read_text(), keep_of(run[0])
    with pytest.raises(UserError, match="out of reach"):
        compress(config(keep=(*keep, 0.001)), run[0])
    assert (run[0] / "manifest.json").read_text() == recorded
    assert sorted(path for path in run[0].rglob("*") if ".prunus" not in path.parts) == before


def keep_of(out: Path) -> tuple[float, ...]:
    """The shares of a run, to which other tests may have added."""
    return tuple(json.loads((out / "manifest.json").read_text())["config"]["keep"])


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"latency_ms": 1}, r"latency-1ms: no network .* Milliseconds of a request go from [\d.]+ to [\d.]+ on"),
        ({"latency_ms": 1e6}, r"latency-1e\+06ms: the dense model meets it already"),
        ({"speedup": 500}, r"speedup-500: no network .* Speed-ups go from 1 to [\d.]+ on this device"),
        ({"tokens_per_second": 1e5}, r"Tokens per second go from [\d.]+ to [\d.]+ on this device"),
        ({"memory_mb": 0.01, "context": 9}, r"Megabytes go from [\d.]+ to [\d.]+ with 9 tokens"),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_range(
    asked: dict[str, Any], sentence: str, counted: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        compress(budget(**asked), tmp_path / "run")
    assert not (tmp_path / "run" / "tokens.safetensors").exists()


def test_a_finished_run_takes_no_second_kind_of_target(run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run
    before = (out / "manifest.json").read_text()
    with pytest.raises(UserError, match=r"one kind of target, given keep 0\.8 0\.6.* and budget\.speedup"):
        step(out, "search", {"budget.speedup": (1.5,)})
    assert (out / "manifest.json").read_text() == before


def test_a_step_that_is_refused_deletes_nothing(run: tuple[Path, dict[str, Any]]) -> None:
    """A share out of reach is not recorded, so that it does not stand in the way of the next command."""
    out, keep = run[0], keep_of(run[0])
    before = (out / "manifest.json").read_text()
    for again in (False, True):
        for changes in ({"keep": (*keep, 0.001)}, {"front.objectives": ("kl", "bytes"), "front.least": 1e-6}):
            with pytest.raises(UserError, match="out of reach"):
                step(out, "search", changes, again=again)
    assert (out / "manifest.json").read_text() == before
    assert [found["name"] for found in step(out, "search", {})["chosen"]] == [f"keep-{k:g}" for k in keep]


def test_the_table_of_another_request_does_not_judge_a_new_one(counted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    compress(budget(speedup="1.4", search__generations=0), out)
    before = (out / "latency.json").read_text()
    with pytest.raises(UserError, match=r"speedup-500: no network .* of prompt, 0 generated"):
        step(out, "search", {"budget.speedup": (500,), "budget.generate": 0})
    assert (out / "latency.json").read_text() == before
    step(out, "search", {"budget.speedup": (1.3,), "budget.generate": 0})
    assert json.loads((out / "latency.json").read_text())["request"]["generate"] == 0


def test_the_default_shares_give_way_to_a_budget(counted: Path, tmp_path: Path) -> None:
    out, shares = tmp_path / "run", config(keep=KEEP)
    with Run.open(out, shares.to_dict(), asdict(loading.load(str(MODEL)).source)):
        pass
    found = step(out, "search", {"budget.speedup": (1.4,), "budget.prompt": 32, "budget.generate": 8})
    assert [n["name"] for n in found["chosen"]] == ["speedup-1.4"]
    assert json.loads((out / "manifest.json").read_text())["config"]["keep"] == []


@pytest.mark.parametrize("changes", [{"search__method": "shen", "search__population": 6}, {"search__method": "nsga2"}])
def test_other_searches_end_in_loadable_checkpoints(changes: dict[str, Any], tmp_path: Path) -> None:
    result = compress(config(keep=(0.8,), **changes), tmp_path / "run")
    (found,) = result["chosen"]
    assert found["kept_blocks"] == pytest.approx(0.8, abs=0.01)
    ids = torch.randint(3, 500, (1, 12))
    assert logits(tmp_path / "run" / "models" / found["name"], ids, trust_remote_code=True).isfinite().all()


@pytest.mark.parametrize("constraint", ["bytes", "flops", "parameters-all"])
def test_a_share_may_be_of_bytes_or_flops(constraint: str, tmp_path: Path) -> None:
    compress(config(search__constraint=constraint, keep=(0.75,), search__generations=1), tmp_path / "run")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "models" / "keep-0.75", trust_remote_code=True)
    dense = AutoModelForCausalLM.from_pretrained(MODEL)
    if constraint == "flops":
        ids = torch.arange(1, 513)[None] % 500
        cost = []
        for model in (small, dense):
            with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                model(ids)
            cost.append(counter.get_total_flops())
        assert cost[0] / cost[1] == pytest.approx(0.75, abs=0.05)  # the budget is for another length than this
    else:
        numbers = [sum(p.numel() for p in model.parameters()) for model in (small, dense)]
        assert 0.745 < numbers[0] / numbers[1] <= 0.75


def test_uniform_networks_are_stock_checkpoints(tmp_path: Path) -> None:
    result = compress(config(keep=(0.7,), uniform=True), tmp_path / "run")
    path = tmp_path / "run" / "models" / result["chosen"][0]["name"]
    assert json.loads((path / "config.json").read_text())["model_type"] in ("llama", "mistral")
    assert not list(path.glob("*.py"))
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; assert 'prunus' not in sys.modules; "
        "print(type(A.from_pretrained(sys.argv[1])).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("transformers.models.")


@pytest.mark.parametrize("score", ["obs", "wanda", "activation", "taylor", "magnitude"])
def test_every_score_can_order_the_units(score: str, tmp_path: Path) -> None:
    changed = config(keep=(0.7,), reform__order="score", score__method=score, search__generations=0)
    result = compress(changed, tmp_path / "run")
    assert 0 < result["chosen"][0]["kl_nats"] < 3


def test_a_score_that_would_order_nothing_is_refused(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give --set reform\.order=score too"):
        compress(config(score__method="wanda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    before = (run[0] / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"give --set reform\.order=score too"):
        step(run[0], "score", {"score.method": "wanda"})
    assert (run[0] / "manifest.json").read_bytes() == before


def test_one_step_again_with_another_setting(run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run
    found = step(out, "search", {"search.generations": "0"})  # as it is typed
    assert {n["name"] for n in found["chosen"]} >= {"keep-0.8", "keep-0.6"}
    with pytest.raises(UserError, match=r"calibration\.samples"):
        step(out, "search", {"calibration.samples": 12})


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """kill -9 in the middle of the search: the same call finishes, and gives what an undisturbed run gives."""
    out, quiet = tmp_path / "killed", tmp_path / "quiet"
    changed = {"search__generations": 6, "search__offspring": 6, "keep": (0.6,)}
    code = (
        "import sys, json; from prunus.config import CompressConfig; from prunus.pipeline import compress; "
        "compress(CompressConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2])"
    )
    raw = json.dumps(config(**changed).to_dict())
    child = subprocess.Popen([sys.executable, "-c", code, raw, str(out)], stderr=subprocess.DEVNULL)
    journal = out / "trials.journal"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and child.poll() is None:
        if journal.exists() and journal.read_text(errors="ignore").count('"op_code":4') >= 8:
            break
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    known = journal.read_text(errors="ignore").count("\n")
    resumed = compress(config(**changed), out)
    assert journal.read_text().count("\n") >= known
    undisturbed = compress(config(**changed), quiet)
    names = ("name", "layers", "parameters", "kl_nats")
    assert [[n[k] for k in names] for n in resumed["chosen"]] == [[n[k] for k in names] for n in undisturbed["chosen"]]
