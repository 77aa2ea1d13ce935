"""`recover`, the step `train` and task accuracies, on a really trained tiny model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hurry import painted
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunus import steps
from prunus.cli import app
from prunus.config import CompressConfig, resolve
from prunus.errors import UserError
from prunus.evaluation import perplexity, text_ids
from prunus.models import loading
from prunus.models.families import family_of, full
from prunus.models.slicing import activate, extract
from prunus.pipeline import compress, step
from prunus.recording.lock import acquire
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.training import draws, supernet
from prunus.training.recovery import recover

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "stories260k-hf"
TEXT = SHARED / "tinystories" / "tinystories_part.txt"
pytestmark = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the tiny trained model of the data beside the project"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A damaged sub-network: the first half of everything, unsorted."""
    from prunus.models.checkpoint import save

    loaded = loading.load(str(MODEL))
    family, whole = family_of(loaded.model.config), full(loaded.model.config)
    layers = tuple(LayerShape(s.kv_heads, s.q_per_kv, s.mlp // 2 + 4 * i) for i, s in enumerate(whole.layers))
    out = tmp_path_factory.mktemp("small") / "small"
    model = extract(loaded.model, family, SubNetwork(whole.hidden, layers))
    save(model, loaded.tokenizer, out, card="", manifest={"source": {"id": str(MODEL)}, "figures": {"ppl": 1.0}})
    return out


def config(model: Path, **changes: Any) -> CompressConfig:
    quick = {
        "model": str(model), "train.data": str(TEXT), "train.length": 64, "train.steps": 40, "train.batch": 8,
        "train.holdout": 8, "train.lr": 2e-3, "train.precision": "float32", "train.save_every": 10,
    }  # fmt: skip
    return resolve(None, {**quick, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.mark.parametrize("rank", [0, 8])
def test_a_network_recovers_and_loads_like_any_other(rank: int, small: Path, tmp_path: Path) -> None:
    found = recover(config(small, train__rank=rank), str(MODEL), tmp_path / "out")
    ends = found["held_out"]
    assert ends["after"]["kl_nats"] < 0.8 * ends["before"]["kl_nats"]
    assert not (tmp_path / "out.training").exists()
    ids = text_ids(TEXT, loading.load(str(MODEL)).tokenizer)
    scores = []
    for path in (small, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        scores.append(perplexity(model, ids, length=64, chunks=20).nats)
    assert scores[1] < scores[0] - 0.1
    manifest = json.loads((tmp_path / "out" / "prunus.json").read_text())
    assert manifest["recovery"]["tokens"] == 40 * 8 * 64
    assert manifest["source"]["id"] == str(MODEL)
    assert "figures" not in manifest
    written = (tmp_path / "out" / "prunus.json").stat().st_mtime_ns
    again = recover(config(small, train__rank=rank), str(MODEL), tmp_path / "out")
    assert again["tokens"] == found["tokens"] and (tmp_path / "out" / "prunus.json").stat().st_mtime_ns == written
    for changes, teacher in (({"seed": 3}, str(MODEL)), ({}, None), ({}, str(small))):
        with pytest.raises(UserError, match="another network"):
            recover(config(small, train__rank=rank, **changes), teacher, tmp_path / "out")
    assert not (tmp_path / "out.training").exists()


def test_one_command_at_a_time_trains_into_a_directory(small: Path, tmp_path: Path) -> None:
    lock = acquire(tmp_path / "out.training")
    with pytest.raises(UserError, match=r"process \d+ .* is working on .*out.training"):
        recover(config(small), str(MODEL), tmp_path / "out")
    lock.release()
    assert not (tmp_path / "out").exists()


def test_a_network_recovers_without_a_teacher_into_the_directory_it_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recover(config(MODEL, train__steps=1), None, ".")
    card = (tmp_path / "here" / "README.md").read_text()
    assert f"# {MODEL.name}, trained further" in card and "Trained by Prunus on" in card
    assert "| held-out windows | nats per token |\n" in card and "nan" not in card
    assert not (tmp_path / "here.training").exists()


@pytest.mark.parametrize("method", ["llm-pruner", "flap", "slicegpt"])  # stock, with biases, a class of its own
def test_a_rivals_network_recovers_too(method: str, tmp_path: Path) -> None:
    asked = {"calibration.source": str(TEXT), "calibration.samples": 16, "calibration.length": 64, "keep": (0.7,)}
    compress(resolve(None, {"model": str(MODEL), "method": method, **asked}), tmp_path / "run")
    cut = tmp_path / "run" / "models" / "keep-0.7"
    found = recover(config(cut, train__rank=8, train__steps=12), str(MODEL), tmp_path / "out")
    assert found["held_out"]["after"]["kl_nats"] < found["held_out"]["before"]["kl_nats"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in AutoModelForCausalLM.from_pretrained(cut, trust_remote_code=True).named_parameters()
    }  # merged


def test_what_recover_cannot_do_is_refused_before_any_training(small: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    other = SHARED / "models" / "babyllama105-hf"
    for settings, teacher, out, match in (
        (config(small, train__data=None), str(MODEL), "a", "no training data"),
        (config(small), str(MODEL), "full", "was not written by Prunus"),
        (config(small), str(other), "a", "another vocabulary"),
        (config(small, train__length=4096), str(MODEL), "a", "at most the model's"),
        (config(small, train__holdout=10**6), str(MODEL), "a", "are to be held out"),
    ):
        with pytest.raises(UserError, match=match):
            recover(settings, teacher, tmp_path / out)


def run_config(**changes: Any) -> CompressConfig:
    quick = {"train__bins": 4, "train__steps": 12, "train__lr": 1e-3}
    quick |= {} if changes.get("train__sampler") in ("grid", "grid-params") else {"train__draws": 3}
    return config(
        MODEL, calibration__source=str(TEXT), calibration__samples=24, calibration__length=128, calibration__holdout=8,
        search__mlp_step=8, **{"keep": (0.6,), "search__generations": 0, **quick, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "trained"
    with painted():
        return out, compress(run_config(), out)


def test_a_run_trains_before_it_searches(trained: tuple[Path, dict[str, Any]]) -> None:
    out, data = trained
    assert [step["name"] for step in data["steps"]] == [
        "calibrate", "score", "train", "reform", "search", "extract", "evaluate",
    ]  # fmt: skip
    note = json.loads((out / "manifest.json").read_text())["notes"]["train"]
    assert note["steps"] == 12
    assert note["tokens"] == 12 * 8 * 64
    first, last = note["held_out"][0], note["held_out"][-1]
    assert last["eval_loss"] < first["eval_loss"]
    assert (out / "supernet" / "model.safetensors").is_file()
    assert "after training the super-network on tinystories_part.txt" in (out / "models/keep-0.6/README.md").read_text()
    dense = AutoModelForCausalLM.from_pretrained(MODEL)
    super_network: Any = AutoModelForCausalLM.from_pretrained(out / "supernet")
    assert sum(p.numel() for p in super_network.parameters()) == sum(p.numel() for p in dense.parameters())


def test_the_report_of_a_trained_run_tells_what_the_training_did(trained: tuple[Path, dict[str, Any]]) -> None:
    out, data = trained
    page, note = (out / "report.md").read_text(), data["training"]
    assert "| KL to the trained full network (nats) |" in page and "KL to the dense" not in page
    assert "12 steps, 6,144 tokens of tinystories_part.txt" in page
    assert "| full network, trained | 100.00 % |" in page
    for name in (key[5:-5] for key in note["held_out"][0] if key.endswith("M_nats")):
        row = [f"{note['held_out'][k][f'eval_{name}_nats']:.4f}" for k in (0, -1)]
        assert f"| {name} | {' | '.join(row)} |" in page
    assert note["network"]["sample"] != data["dense"]["sample"] and note["versions"]["peft"]
    assert json.loads((out / "evaluation" / "trained.json").read_text())["sample"] == note["network"]["sample"]


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "standard"},
        {"strategy": "random", "sampler": "calibrated-ppl"},
        {"strategy": "sandwich-grid", "sampler": "calibrated-magnitude", "space": "llama_joint"},
        {"teacher": "dense", "sampler": "calibrated-kl", "space": "llama_joint", "ce": 0.5},
    ],
)
def test_every_strategy_sampler_and_teacher_trains_a_run(
    settings: dict[str, Any], trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    asked = {f"train.{key}": value for key, value in {**settings, "steps": 2, "eval_every": 1}.items()}
    found = step(out, "train", asked)
    looks = [row["step"] for row in found["held_out"]]
    assert looks == [0, 1, 2, 2]  # before, after each step, and at the end
    watched = [key for key in found["held_out"][0] if key.endswith("_nats")]
    assert len(watched) >= 2 and all(math.isfinite(row[key]) for row in found["held_out"] for key in watched)
    pool = json.loads((out / "pool.json").read_text())
    assert ("sizes" in found) == bool(pool["networks"]) == (settings.get("strategy") != "standard")
    chosen = [one for one in pool["bins"] if one["candidates"]]
    assert len(chosen) >= 2 * bool(pool["bins"]) and all(one["chosen"] for one in chosen)


def test_networks_are_chosen_again_only_for_settings_that_decide_them(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    before = (out / "pool.json").read_bytes()

    def choose(*_: Any, **__: Any) -> Any:
        raise RuntimeError("chosen again")

    monkeypatch.setattr(draws, "pool_of", choose)
    step(out, "train", {"train.lr": 1e-5, "train.steps": 1})
    assert (out / "pool.json").read_bytes() == before
    with pytest.raises(RuntimeError, match="chosen again"):
        step(out, "train", {"train.bins": 5})


def test_states_of_the_dense_model_are_told_apart_by_the_order_of_its_channels(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "run", []
    shutil.copytree(trained[0], out)

    def stop(model: Any, folder: Any, ids: Any, name: str) -> Any:
        names.append(name)
        raise RuntimeError("seen")

    monkeypatch.setattr(supernet, "Teacher", stop)
    for space in ("groups", "llama_joint", "groups"):
        with pytest.raises(RuntimeError, match="seen"):
            step(out, "train", {"train.teacher": "dense", "train.space": space})
    assert names[0] == names[2] != names[1]


def test_what_was_trained_on_is_no_test_text_afterwards_either(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    with pytest.raises(UserError, match="test text and training text at once"):
        step(out, "report", {"test_text": str(TEXT), "test_length": 64, "test_chunks": 2})


def test_a_run_without_training_data_cannot_train(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["config"]["train"] = {"data": None}
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="no training data"):
        step(out, "train", {})
    assert (out / "manifest.json").read_bytes() == before


def test_sub_networks_of_the_trained_super_network_are_better(trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    pool = json.loads((out / "pool.json").read_text())
    ids = text_ids(TEXT, loading.load(str(MODEL)).tokenizer)[-20 * 64 :]
    sub = SubNetwork.from_json(pool["networks"][1])
    model: Any = AutoModelForCausalLM.from_pretrained(out / "supernet")
    with activate(model, family_of(model.config), sub):
        after = perplexity(model, ids, length=64).nats
    dense: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    with activate(dense, family_of(dense.config), sub):
        before = perplexity(dense, ids, length=64).nats
    assert after < before
    assert len(pool["histogram"]["random"]) == 21
    assert "![sizes of uniform draws and of the pool](report/sizes.png)" in (out / "report.md").read_text()
    (out / "report" / "sizes.png").unlink()
    with painted():
        assert step(out, "train", {})["sizes"] == str(out / "report" / "sizes.png")
    assert (out / "report" / "sizes.png").stat().st_size > 10_000


def test_a_finished_training_is_not_done_again(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again"
    shutil.copytree(trained[0], out)
    monkeypatch.setattr(supernet, "_train", lambda *a: pytest.fail("trained again"))
    again = compress(replace(run_config(), keep=(0.6, 0.5)), out)
    assert again["chosen"][0]["kl_nats"] == trained[1]["chosen"][0]["kl_nats"]


@pytest.mark.parametrize("space", ["llama_joint", "layers"])
def test_hidden_sizes_and_layers_of_their_own_can_be_trained(space: str, tmp_path: Path) -> None:
    data = compress(
        run_config(train__space=space, train__sampler="grid-params", train__steps=2, train__rank=2), tmp_path
    )
    assert math.isfinite(data["chosen"][0]["kl_nats"])


@pytest.mark.parametrize(("space", "keep"), [("llama_joint", 0.6), ("llama_joint", 0.1), ("medium", 0.6)])
def test_the_search_can_stay_in_the_space_of_the_training(space: str, keep: float, tmp_path: Path) -> None:
    asked = run_config(
        train__space=space, train__sampler="grid-params", train__steps=2, search__space="trained", keep=(keep,),
        search__generations=1, search__offspring=4,
        **({"search__attention": "whole", "search__depth": False} if space == "medium" else {}),  # not in this space
    )  # fmt: skip
    (found,) = compress(asked, tmp_path)["chosen"]
    whole = full(AutoModelForCausalLM.from_pretrained(MODEL).config)
    assert keep * 0.8 < found["kept_blocks"] <= keep
    assert math.isfinite(found["kl_nats"])
    assert found["uniform"] or space == "medium"
    if keep == 0.1:  # no network of the whole hidden size is that small
        assert found["hidden"] < whole.hidden
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / found["path"], trust_remote_code=True)
    assert small.config.hidden_size == found["hidden"]
    assert math.isfinite(perplexity(small, text_ids(TEXT, loading.load(str(MODEL)).tokenizer)[:640], length=64).nats)
    units = load_file(tmp_path / "units.safetensors")
    assert sorted(units["layers"].tolist()) == list(range(len(whole.layers)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train__data": None}, "nothing is trained"),
        ({"train__space": "medium", "uniform": True}, "all layers alike"),
        ({"train__space": "llama_joint", "budget__speedup": "1.2", "keep": None}, "own hidden size"),
        ({"train__space": "llama_joint", "search__method": "shen"}, "every layer by itself"),
    ],
)
def test_what_the_space_of_the_training_cannot_serve_is_refused(
    changes: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "calibrate", lambda s: pytest.fail("calibrated"))
    with pytest.raises(UserError, match=match):
        compress(run_config(search__space="trained", **changes), tmp_path / "run")


def test_what_a_run_cannot_train_is_refused_before_any_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "calibrate", lambda s: pytest.fail("calibrated"))
    for number, (changes, words) in enumerate(
        (
            (
                {"train__strategy": "standard", "train__teacher": "dense", "train__bins": 22, "train__draws": 10},
                "would learn nothing by imitating it",
            ),
            ({"train__strategy": "standard"}, "train.bins, train.draws would change nothing"),
            ({"train__data": str(tmp_path / "none.txt")}, "none.txt"),
            ({"train__report_to": "nowhere"}, "nowhere is not supported"),
            ({"train__length": 4096}, r"at most the model's .* --window 4096"),
            ({"train__rank": 2, "train__adapt": "all"}, "use --adapt linear"),
            ({"train__bins": 3, "train__trials": 1, "train__least": 0.98}, "none of 3 draws but the full network"),
            ({"test_text": str(TEXT)}, "test text and training text at once"),
        )
    ):
        with pytest.raises(UserError, match=words):
            compress(run_config(**changes), tmp_path / str(number))


def test_sub_networks_of_an_unsorted_training_are_the_first_members(tmp_path: Path) -> None:
    """For comparison with sorted ones, as in the ablation of Sukthanker et al."""
    few = {"train__steps": 1, "train__lr": 1e-6, "train__sampler": "grid-params", "train__space": "llama_joint"}
    found = compress(run_config(train__sort=False, **few), tmp_path)
    assert math.isfinite(found["chosen"][0]["kl_nats"])
    units = load_file(tmp_path / "units.safetensors")
    assert units["hidden"].tolist() == list(range(len(units["hidden"])))
    assert units["layers"].tolist() == list(range(len(units["layers"])))
    dense, own = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "supernet" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert float((own[name] - dense[name]).abs().max()) < 1e-4  # its rows are where they were


def test_a_run_goes_on_with_a_lower_rate_and_begins_again_with_other_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunus.training import loop

    asked = {"train__steps": 6, "train__save_every": 2, "train__sampler": "grid-params"}
    real, log = loop.divergence, tmp_path / "training" / "log.jsonl"

    def spoilt(*given: Any) -> Any:
        return real(*given) * (float("nan") if (tmp_path / "training" / "checkpoint-4").exists() else 1.0)

    monkeypatch.setattr(loop, "divergence", spoilt)
    with pytest.raises(UserError, match=r"nan at step 5, .* prunus train RUN with them, goes on from that state"):
        compress(run_config(**asked), tmp_path)
    monkeypatch.setattr(loop, "divergence", real)
    with pytest.raises(UserError, match="prunus train"):  # which the plain command may not do by itself
        compress(run_config(**asked, train__lr=1e-4), tmp_path)
    steps_of = loop.SandwichTrainer.plan
    seen: list[int] = []
    monkeypatch.setattr(
        loop.SandwichTrainer, "plan", lambda self: (seen.append(self.state.global_step), steps_of(self))[1]
    )
    found = step(tmp_path, "train", {"train.lr": 1e-4})
    assert seen == [4, 5]
    assert found["eased"] == [{"step": 4, "lr": [1e-3, 1e-4]}]
    assert json.loads((tmp_path / "manifest.json").read_text())["notes"]["train"]["eased"] == found["eased"]
    assert log.is_file() and not list((tmp_path / "training").glob("checkpoint-*"))
    seen.clear()
    monkeypatch.setattr(loop, "divergence", spoilt)
    with pytest.raises(UserError, match="nan at step 5"):
        step(tmp_path, "train", {"train.kd": 2.0})
    monkeypatch.setattr(loop, "divergence", real)
    seen.clear()
    assert "eased" not in step(tmp_path, "train", {"train.kd": 0.5})
    assert seen == [0, 1, 2, 3, 4, 5]


def test_the_command_trains_an_existing_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(tmp_path), "--train", "x.txt"])
    assert done.exit_code == 2
    assert "is no run of Prunus" in done.output


def test_a_metric_that_is_asked_for_is_the_one_that_is_given() -> None:
    from prunus.tasks import Asked, _figure

    raw = {
        "results": {"boolq": {"alias": "boolq", "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "n-samples": {"boolq": {"original": 4, "effective": 4}},
    }
    assert _figure(raw, Asked("boolq", 0, "acc"), False) == {
        "value": 0.5, "se": 0.1, "metric": "acc", "shots": 0, "n": 4,
    }  # fmt: skip
    assert _figure(raw, Asked("boolq", 0, ""), False)["metric"] == "acc"
    for metric in ("acc_norm", "exact_match,strict-match"):
        with pytest.raises(UserError, match=rf"boolq has no figure {metric} \(it has: acc\)"):
            _figure(raw, Asked("boolq", 0, metric), False)
    with pytest.raises(UserError, match=r"has no figure at all \(it has: none\)"):
        _figure({"results": {"boolq": {"alias": "boolq"}}}, Asked("boolq", 0, ""), False)


def test_suites_are_the_papers() -> None:
    from prunus.tasks import asked_for

    paper = {a.task: (a.shots, a.metric) for a in asked_for(["paper"])}
    assert len(paper) == 11
    assert paper["arc_challenge"] == (25, "acc_norm")
    assert paper["gsm8k"] == (5, "exact_match,strict-match")
    assert len(asked_for(["shen7"], shots=0)) == 7
