"""One more network of a finished run, for a share or a budget: good, recorded, and no trouble for the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_pipeline import MODEL, TEXT, config, logits
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus import cli, picking
from prunus.config import BudgetConfig
from prunus.errors import UserError
from prunus.models import costs
from prunus.models.families import family_of, full
from prunus.models.loading import load
from prunus.pipeline import compress, step
from prunus.subnetwork import SubNetwork
from prunus.timing import runtimes
from prunus.timing.timetable import Timetable

pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the tiny trained model of the data beside the project"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    compress(config(keep=(0.9, 0.8, 0.6, 0.5)), out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def artefacts(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["artefacts"]
    return found


def figures(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return found


def test_a_pick_stands_between_its_neighbours_and_is_foretold(run: Path) -> None:
    result = prunus.pick(run, 0.7, measure=True)
    (found,) = result["chosen"]
    assert result["from"] == ["keep-0.8", "keep-0.6"]
    assert found["kept_blocks"] == pytest.approx(0.7, abs=0.004)
    assert figures(run, "keep-0.8")["kl_nats"] < found["kl_nats"] < figures(run, "keep-0.6")["kl_nats"]
    assert found["predicted_kl_nats"] == pytest.approx(found["kl_nats"], rel=0.15)
    assert 1 < found["predicted_factor"] < 1.5
    path = run / "models" / "pick-0.7"
    assert result["picked"] == str(path)
    ids = AutoTokenizer.from_pretrained(path)(TEXT.read_text()[:400], return_tensors="pt").input_ids
    dense, small = (logits(p, ids, trust_remote_code=True).log_softmax(-1) for p in (MODEL, path))
    assert 0 < float((dense.exp() * (dense - small)).sum(-1).mean()) < 2 * found["kl_nats"]
    card = (path / "README.md").read_text()
    assert f"{found['kl_nats']:.4f}" in card
    assert f"{found['predicted_kl_nats']:.4f}" in card


def test_the_neighbours_weights_are_worth_having(run: Path) -> None:
    """Without any token seen, a pick is better than the one-shot network that a run without finished networks gives."""
    carried = prunus.pick(run, 0.7, refit=0, measure=True)["chosen"][0]
    for folder in ("search", "weights", "evaluation"):
        shutil.rmtree(run / folder)
    alone = prunus.pick(run, 0.7, refit=0, measure=True, out=run.parent / "alone")
    assert alone["from"] == []
    assert "predicted_kl_nats" not in alone["chosen"][0]
    assert any("no refitted network" in note for note in alone["notes"])
    assert carried["kl_nats"] < alone["chosen"][0]["kl_nats"]


def test_the_run_goes_on_as_if_nothing_had_been_picked(run: Path) -> None:
    before = artefacts(run)
    first = prunus.pick(run, 0.7)
    with_pick = artefacts(run)
    assert {name: entry for name, entry in with_pick.items() if entry["step"] != "pick"} == before
    assert set(with_pick) - set(before) == {"weights/pick-0.7.safetensors", "models/pick-0.7"}
    compress(config(keep=(0.9, 0.8, 0.6, 0.5)), run)
    assert artefacts(run) == with_pick
    assert prunus.pick(run, 0.7) == first
    assert artefacts(run) == with_pick
    step(run, "search", {"search.generations": 0})  # makes all that is the run's stale, and leaves the pick alone
    assert artefacts(run)["models/pick-0.7"] == with_pick["models/pick-0.7"]
    assert (run / "models" / "pick-0.7" / "model.safetensors").is_file()
    assert not (run / "models" / "keep-0.8").exists()
    with pytest.raises(UserError, match=r"made otherwise \(from other weights\)"):
        prunus.pick(run, 0.7)  # the neighbours have no weights any more


def test_another_pick_of_the_same_name_is_refused_until_the_first_is_gone(run: Path) -> None:
    prunus.pick(run, 0.7, refit=1)
    with pytest.raises(UserError, match=r"refit: 1 there, 2 now.*--out"):
        prunus.pick(run, 0.7, refit=2)
    shutil.rmtree(run / "models" / "pick-0.7")
    assert Path(prunus.pick(run, 0.7, refit=2)["picked"]).is_dir()
    assert prunus.pick(run, 0.7, keep_of="all", refit=2)["picked"].endswith("pick-0.7-of-all")
    (run / "models" / "pick-0.65").mkdir()
    (run / "models" / "pick-0.65" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="in the way"):
        prunus.pick(run, 0.65)


def test_measuring_later_changes_the_card_and_nothing_else(run: Path) -> None:
    plain = prunus.pick(run, 0.7)
    weights = (run / "models" / "pick-0.7" / "model.safetensors").read_bytes()
    measured = prunus.pick(run, 0.7, measure=True)
    assert "kl_nats" not in plain["chosen"][0]
    assert measured["chosen"][0]["kl_nats"] > 0
    assert (run / "models" / "pick-0.7" / "model.safetensors").read_bytes() == weights
    assert "predicted" in (run / "models" / "pick-0.7" / "README.md").read_text()
    assert prunus.pick(run, 0.7) == measured  # what is known is said again
    assert not list((run / "models").glob("*.changed-*"))


def test_a_pick_may_go_elsewhere(run: Path, tmp_path: Path) -> None:
    before = (run / "manifest.json").read_text()
    out = tmp_path / "deep" / "mine"
    assert prunus.pick(run, 0.7, refit=1, out=out)["picked"] == str(out)
    assert (run / "manifest.json").read_text() == before
    assert logits(out, torch.tensor([[1, 5, 9]]), trust_remote_code=True).isfinite().all()
    prunus.pick(run, 0.7, refit=1, out=out)
    with pytest.raises(UserError, match="made otherwise"):
        prunus.pick(run, 0.75, refit=1, out=out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(UserError, match="in the way"):
        prunus.pick(run, 0.7, out=tmp_path / "mine")


def test_beyond_the_ends_of_the_front(run: Path) -> None:
    """Above the largest network the dense model is the other neighbour; below the smallest there is one only."""
    above, below = prunus.pick(run, 0.95, measure=True), prunus.pick(run, 0.45, measure=True)
    assert (above["from"], below["from"]) == (["keep-0.9"], ["keep-0.5"])
    assert 0 < above["chosen"][0]["kl_nats"] < figures(run, "keep-0.9")["kl_nats"]
    assert below["chosen"][0]["kl_nats"] > figures(run, "keep-0.5")["kl_nats"]
    assert above["chosen"][0]["predicted_factor"] is None
    assert any("beyond the run's networks" in note for note in above["notes"])


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        (0.0005, "out of reach"),
        (70.0, r"keep lies in \(0, 1\]; given 70; for 70 per cent write 0.7"),
        (float("nan"), r"keep lies in \(0, 1\]"),
        (0.8, "has a network of that share.*models/keep-0.8"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(run: Path, keep: float, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        prunus.pick(run, keep)
    assert not list((run / "models").glob("pick-*"))


def test_an_unfinished_run_is_told_which_command_is_missing(run: Path, tmp_path: Path) -> None:
    (run / "errors.safetensors").unlink()
    with pytest.raises(UserError, match=r"errors\.safetensors .*prunus reform "):
        prunus.pick(run, 0.7)
    (run / "importance.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"importance\.safetensors .*prunus score "):
        prunus.pick(run, 0.7)
    with pytest.raises(UserError, match="no run of Prunus"):
        prunus.pick(tmp_path / "nothing", 0.7)


def test_a_model_that_moved_is_named_and_another_one_is_refused(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["model"] = str(tmp_path / "gone")
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no model at"):
        prunus.pick(run, 0.7)
    shutil.copytree(MODEL, tmp_path / "moved")
    assert prunus.pick(run, 0.7, refit=0, model=str(tmp_path / "moved"))["chosen"][0]["name"] == "pick-0.7"
    settings = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**settings, "rope_theta": 1234.0}))
    with pytest.raises(UserError, match=r"run of another model.*--model"):
        prunus.pick(run, 0.65, model=str(tmp_path / "moved"))


def test_a_pick_of_a_uniform_run_is_uniform(tmp_path: Path) -> None:
    compress(config(keep=(0.8, 0.5), uniform=True), tmp_path / "run")
    found = prunus.pick(tmp_path / "run", 0.65, measure=True)["chosen"][0]
    assert found["uniform"]
    assert found["kl_nats"] > 0
    path = tmp_path / "run" / "models" / "pick-0.65"
    assert json.loads((path / "config.json").read_text())["model_type"] in ("llama", "mistral")
    assert not list(path.glob("*.py"))


def test_the_command(run: Path) -> None:
    def typed(*words: str) -> Any:
        return CliRunner().invoke(cli.app, [*words], prog_name="prunus")

    done = typed("pick", str(run), "--keep", "0.7", "--refit", "1", "--json", str(run / "pick.json"))
    assert done.exit_code == 0, done.output
    assert "predicted KL" in done.stdout
    assert f"picked: {run}/models/pick-0.7" in done.stdout.replace("\n", "")
    assert "keep-0.8 and keep-0.6" in done.stderr
    assert json.loads((run / "pick.json").read_text())["chosen"][0]["name"] == "pick-0.7"
    for words, sentence in (
        ([], "one point of the run's front (--point N); given none of them"),
        (["--keep", "0.7", "--point", "1"], "given keep 0.7 and point 1"),
        (["--point", "1", "--keep-of", "all"], "leave it out"),
        (["--keep", "0.7", "0.6"], "one pick at a time"),
        (["--keep", "0.7", "--seed", "3"], "No such option"),
        (["--keep", "0.7", "--keep-of", "rings"], "keep_of is one of"),
        (["--keep", "0.7", "--refit", "-1"], "refit is a number of windows"),
    ):
        done = typed("pick", str(run), *words)
        assert done.exit_code == 2
        assert sentence in done.stderr


# ------------------------------------------------------------------------------------------------------------ budgets


REQUEST = {"prompt": 48, "batch": 1, "generate": 4}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table_of(run: Path, **request: Any) -> Timetable:
    loaded = load(str(MODEL))
    budget = BudgetConfig(**{**REQUEST, **request})
    return runtimes.measure(loaded.model, family_of(loaded.model.config), budget)


def chosen(found: dict[str, Any]) -> SubNetwork:
    """The network of a pick's checkpoint."""
    raw = json.loads((Path(found["picked"]) / "prunus.json").read_text())["subnetwork"]
    return SubNetwork.from_json(raw)


def test_a_pick_by_speed_meets_it_by_the_table(run: Path, cache: Path) -> None:
    table, whole = table_of(run), full(load(str(MODEL)).model.config)
    before = artefacts(run)
    found = prunus.pick(run, budget={"speedup": 1.2, **REQUEST})
    assert Path(found["picked"]).name == "pick-speedup-1.2"
    sub, dense = chosen(found), table.request_ms(whole)
    assert table.request_ms(sub) <= dense / 1.2 * (1 + 1e-9)
    assert table.request_ms(sub) > 0.5 * dense / 1.2  # and not by far
    assert found["chosen"][0]["predicted_ms"] == pytest.approx(table.request_ms(sub))
    assert {k: v for k, v in artefacts(run).items() if "pick" not in k} == before
    ms = dense / 1.2
    again = prunus.pick(run, budget={"latency_ms": ms, **REQUEST})
    assert chosen(again) == sub, "a speed-up and the milliseconds that it means are one budget"
    rate = prunus.pick(run, budget={"tokens_per_second": 1100 / table.ms(whole, "decode"), **REQUEST})
    assert table.tokens_per_second(chosen(rate)) >= 1100 / table.ms(whole, "decode") * (1 - 1e-9)


def test_a_pick_by_memory_counts_weights_and_cache(run: Path) -> None:
    model = load(str(MODEL)).model
    layout, whole = costs.layout(model, family_of(model.config)), full(model.config)
    width = next(model.parameters()).element_size()
    budget = 0.8 * costs.memory_bytes(layout, whole, 256, 2, width) / 1e6
    found = prunus.pick(run, budget={"memory_mb": budget, "context": 256, "batch": 2})
    used = costs.memory_bytes(layout, chosen(found), 256, 2, width) / 1e6
    assert 0.9 * budget < used <= budget
    assert Path(found["picked"]).name == f"pick-memory-{budget:g}mb"
    assert AutoModelForCausalLM.from_pretrained(found["picked"], trust_remote_code=True).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False
    ).shape == (1, 5)


def test_a_run_of_times_gives_its_own_table(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "timed"
    request = {f"budget__{key}": value for key, value in REQUEST.items()}
    compress(config(keep=(), budget__speedup=(1.15,), **request), out)
    monkeypatch.setattr(runtimes, "measure", lambda *a, **b: pytest.fail("measured, though the run has the table"))
    found = prunus.pick(out, budget={"speedup": 1.25})
    table = Timetable.from_json((out / "latency.json").read_text())
    assert table.request_ms(chosen(found)) <= table.request_ms(full(load(str(MODEL)).model.config)) / 1.25 * (1 + 1e-9)
    assert found["from"] == ["speedup-1.15"]
    with pytest.raises(UserError, match=r"the run has a network of that budget.*speedup-1\.15; take that one"):
        prunus.pick(out, budget={"speedup": 1.15})


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"budget": {"prompt": 64}}, r"prompt says what a budget is counted for.*--latency-ms"),
        ({"budget": {"speedup": 1.5, "latency_ms": 3}}, "one share .* given speedup and latency_ms"),
        ({"keep": 0.7, "budget": {"memory_mb": 1.0}}, "given keep 0.7 and memory_mb"),
        ({"budget": {"speedup": (1.5, 1.7)}}, "one pick at a time, given speedup 1.5 1.7"),
        ({"budget": {"memory_mb": 1.0}, "keep_of": "all"}, "given all with memory_mb"),
        ({"budget": {"memory_mb": 1e-3}}, r"no network of this search space meets it. Megabytes go from"),
        ({}, "given none of them"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(run: Path, asked: dict[str, Any], sentence: str) -> None:
    before = artefacts(run)
    with pytest.raises(UserError, match=sentence):
        prunus.pick(run, **asked)
    assert artefacts(run) == before


def test_the_command_takes_a_budget(run: Path, cache: Path) -> None:
    words = ["pick", str(run), "--speedup", "1.2", "--prompt", "48", "--batch", "1", "--generate", "4", "--quiet"]
    done = CliRunner().invoke(cli.app, words, obj=words)
    assert done.exit_code == 0, done.output
    assert (run / "models" / "pick-speedup-1.2" / "model.safetensors").is_file()
    words = ["pick", str(run), "--speedup", "50", "--prompt", "48", "--batch", "1", "--generate", "4"]
    done = CliRunner().invoke(cli.app, words, obj=words)
    assert done.exit_code == 2 and "Speed-ups go from" in " ".join(done.output.split())


def test_a_table_is_gone_by_where_it_was_measured() -> None:
    model = tiny("llama")
    here = {"device": "cpu, some processor", "dtype": "float32"}
    assert picking._same_place(here, model)
    assert not picking._same_place({**here, "device": "NVIDIA H200"}, model)
    assert not picking._same_place({**here, "dtype": "bfloat16"}, model)
