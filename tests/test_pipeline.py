"""The whole method on a really trained tiny model: checkpoints that load and beat the control; resume; every search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus.config import CompressConfig, resolve
from prunus.errors import UserError
from prunus.pipeline import compress, step

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


@pytest.mark.parametrize("keep", [0.008, 0.0005])
def test_a_share_out_of_reach_is_refused_before_any_work(keep: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of reach"):
        compress(config(keep=(keep,)), tmp_path / "run")
    assert not (tmp_path / "run" / "tokens.safetensors").exists()


def test_a_setting_that_the_search_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.hidden"):
        compress(config(search__hidden=True), tmp_path / "run")


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


def test_one_step_again_with_another_setting(run: tuple[Path, dict[str, Any]]) -> None:
    out, _ = run
    found = step(out, "search", {"search.generations": 0})
    assert {n["name"] for n in found["chosen"]} >= {"keep-0.8", "keep-0.6"}
    with pytest.raises(UserError, match=r"calibration\.samples"):
        step(out, "search", {"calibration.samples": 12})


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """kill -9 in the middle of the search: the same call finishes, and gives what an undisturbed run gives."""
    out, quiet = tmp_path / "killed", tmp_path / "quiet"
    changed = {"search__generations": 6, "search__offspring": 6}
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
