"""The step `front` on a really trained tiny model: every objective, its control, its report, resuming, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hurry import painted
from test_tasks import task_folder

from prunus import fronts, steps
from prunus.cli import app
from prunus.config import CompressConfig, resolve
from prunus.errors import UserError
from prunus.fronts import volumes
from prunus.models import costs, loading
from prunus.models.families import family_of, full
from prunus.models.slicing import activate, extract
from prunus.picking import pick
from prunus.pipeline import compress, step
from prunus.recording.run import read_manifest
from prunus.searching.pareto import front
from prunus.searching.study import Record
from prunus.subnetwork import SubNetwork
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
        "model": str(MODEL), "keep": (0.7,), "calibration.source": str(TEXT), "calibration.samples": 24,
        "calibration.length": 128, "calibration.holdout": 8, "search.mlp_step": 8, "search.generations": 0,
        "front.evaluations": 24, "front.population": 8, "reform.sequential": False,
    }  # fmt: skip
    return resolve(None, {**quick, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "front"
    with painted():
        return out, compress(config(front__objectives="kl,bytes", front__population=12), out)


def searched(out: Path, side: str = "searched") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "search" / "front.json").read_text())[side]["front"]
    return found


def test_a_front_beside_a_random_one_at_equal_evaluations(run: tuple[Path, dict[str, Any]]) -> None:
    out, data = run
    found = json.loads((out / "search" / "front.json").read_text())
    assert data["front"] == found
    model: Any = loading.load(str(MODEL)).model
    layout = costs.layout(model, family_of(model.config))
    for side in ("searched", "control"):
        assert len(found[side]["tried"]) == 24 == found["evaluations"]
        rows = searched(out, side)
        assert len(rows) > 2
        assert front(rows, lambda row: tuple(row["values"].values())) == rows
        for row in rows:
            sub = SubNetwork.from_json(row["subnetwork"])
            assert row["values"]["bytes"] == costs.n_bytes(layout, sub, 4)
            assert row["parameters"] == costs.parameters(layout, sub, "all")
            assert 0.4 <= row["values"]["bytes"] / found["dense"][1] < 1
            assert 0 < row["values"]["kl"] < 4 and row["errors"]["kl"] > 0 and row["errors"]["bytes"] is None
            assert row["values"]["kl"] != row["search_values"]["kl"]  # judged again, on other text
            assert [row["search_values"]["kl"], row["values"]["bytes"]] in found[side]["tried"]
        assert 0 < found[side]["hypervolume"] < 1  # 24 evaluations of a tiny model do not say who is ahead
    assert found["dense"] == [pytest.approx(0, abs=1e-5), costs.n_bytes(layout, full(model.config), 4)]


def test_workers_that_share_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one process at a time"):
        compress(config(search__workers=2), tmp_path / "run")


def test_the_report_shows_the_front_and_its_control(run: tuple[Path, dict[str, Any]]) -> None:
    out, data = run
    text = (out / "report.md").read_text()
    assert "## A front of kl and bytes" in text
    assert "report/searched.png" in text
    assert (out / "report" / "searched.png").stat().st_size > 10_000
    assert f"{data['front']['control']['hypervolume']:.3f} at random" in text
    assert text.count("±") >= len(data["front"]["searched"]["front"])
    assert "front" in [step["name"] for step in data["steps"]]


def test_the_same_command_again_computes_nothing(run: tuple[Path, dict[str, Any]]) -> None:
    out, first = run
    before = read_manifest(out)["artefacts"]
    assert compress(config(front__objectives="kl,bytes", front__population=12), out)["front"] == first["front"]
    assert read_manifest(out)["artefacts"] == before


def test_a_front_may_be_asked_of_a_finished_run_and_search_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    compress(config(), out)
    before = read_manifest(out)["artefacts"]
    flags = ["--front", "kl", "parameters", "--front-method", "local", "--front-evaluations", "12"]
    done = CliRunner().invoke(app, ["search", str(out), *flags, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    after = read_manifest(out)["artefacts"]
    assert set(after) - set(before) == {"search/front.json"}
    assert {file: after[file] for file in before} == before  # nothing else was done again
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["front"]["method"] == "local"
    assert len(found["front"]["control"]["tried"]) == 12
    assert "of a random search" in done.output
    assert "## A front of kl and parameters" in Path(step(out, "report", {})["report"]).read_text()


def test_a_front_resumes_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(front__objectives="perplexity,flops", front__method="tpe")
    whole = compress(asked, tmp_path / "whole")["front"]
    add, left = Record._add, [30]

    def dies(self: Record, *given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, *given)

    monkeypatch.setattr(Record, "_add", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(asked, tmp_path / "run")
    monkeypatch.setattr(Record, "_add", lambda self, *given: (left.append(1), add(self, *given))[1])
    assert compress(asked, tmp_path / "run")["front"] == whole
    tokens = sum(len(whole[side]["tried"]) + len(whole[side]["front"]) for side in ("searched", "control"))
    assert 0 < len(left) - 1 <= tokens + 1 - 25  # what was known is not judged again
    assert all(math.exp(0) < row["values"]["perplexity"] < 600 for row in whole["searched"]["front"])


def test_milliseconds_are_an_objective_of_a_run_that_has_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_models(models: Sequence[Any], request: Request, **given: Any) -> list[Laps]:
        def lap(layers: Any) -> Lap:
            return Lap(2.0, tuple(0.1 + sum(p.numel() for p in layer.parameters()) / 1e4 for layer in layers))

        return [Laps([lap(model.model.layers)], [lap(model.model.layers)]) for model in models]

    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("prunus.timing.latency.time_models", time_models)
    asked = config(front__objectives="kl,latency,bytes", budget__prompt=32, budget__generate=4, front__evaluations=16)
    data = compress(asked, tmp_path / "run")
    rows = data["front"]["searched"]["front"]
    assert all(0 < row["values"]["latency"] < data["front"]["dense"][1] for row in rows)
    by_size = sorted(rows, key=lambda row: row["values"]["bytes"])
    assert by_size[0]["values"]["latency"] < by_size[-1]["values"]["latency"]
    point = next(row for row in rows if row["subnetwork"] != rows[-1]["subnetwork"])
    (picked,) = pick(tmp_path / "run", point=point["point"])["chosen"]
    assert picked["predicted_ms"] == pytest.approx(point["values"]["latency"])  # by the run's own table
    assert "latency" not in data  # its targets are shares: the report has no table of times
    assert (tmp_path / "run" / "report" / "searched.svg").is_file()


def test_validation_loss_is_that_of_windows_which_are_not_trained_on(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    text = TEXT.read_text()
    rows = [{"instruction": text[k : k + 60], "output": text[k + 60 : k + 160]} for k in range(0, 160 * 200, 160)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    asked = config(
        front__objectives="loss,parameters", train__data=str(data), train__length=64, train__steps=1, train__batch=2,
        train__holdout=8, train__sampler="grid", train__precision="float32", front__evaluations=8,
        front__population=4,
    )  # fmt: skip
    found = compress(asked, tmp_path / "run")["front"]
    assert all(0 < row["values"]["loss"] < 20 and row["errors"]["loss"] > 0 for row in found["searched"]["front"])
    loaded = loading.load(str(tmp_path / "run" / "supernet"))
    from prunus.texts.instructions import windows_of

    _, held = windows_of(asked.train, loaded.tokenizer, None, asked.seed)
    assert held is not None
    ids, labels = held.ids[4:], held.labels[4:]
    nats = [float(loaded.model(ids[k : k + 1], labels=labels[k : k + 1]).loss.item()) for k in range(len(ids))]
    assert found["dense"][0] == pytest.approx(sum(nats) / len(nats), rel=1e-4)  # as transformers counts it


def test_task_accuracy_is_an_objective_with_its_standard_error(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks")
    asked = config(
        front__objectives="accuracy,parameters", front__tasks="arc_easy", front__tasks_path=str(folder),
        front__task_limit=6, front__evaluations=4, front__population=2,
    )  # fmt: skip
    found = compress(asked, tmp_path / "run")["front"]
    for side in ("searched", "control"):
        assert all((6 * value) == pytest.approx(round(6 * value)) for value, _ in found[side]["tried"])
        for row in found[side]["front"]:
            right = 1 - row["values"]["accuracy"]
            assert row["errors"]["accuracy"] == pytest.approx(math.sqrt(right * (1 - right) / 5), rel=1e-6)
    from prunus.tasks import asked_for, evaluate_tasks

    loaded = loading.load(str(MODEL))
    both = [
        evaluate_tasks(loaded.model, loaded.tokenizer, asked_for(["arc_easy"]), path=folder, **some)["tasks"][0]
        for some in ({"limit": 12}, {"limit": 6}, {"limit": 6, "skip": 6})  # type: ignore[arg-type]
    ]
    assert [row["n"] for row in both] == [12, 6, 6]
    assert both[0]["value"] == pytest.approx((both[1]["value"] + both[2]["value"]) / 2)
    assert found["dense"][0] == pytest.approx(1 - both[2]["value"])  # judged on the examples that no search has seen
    assert found["dense_errors"] == [pytest.approx(both[2]["se"]), None]
    card = (Path(pick(tmp_path / "run", point=1)["picked"]) / "README.md").read_text()
    line = next(row for row in card.splitlines() if row.startswith("| task error"))
    assert line.count(" ± ") == 2, line
    session: Any = SimpleNamespace(config=asked)
    records = (tmp_path / "run" / "trials.journal").read_text()
    assert f"front accuracy of {fronts._examples(session)}" in records
    with (folder / "arc_easy.yaml").open("a") as file:
        file.write("description: something else\n")  # another task of the same name
    assert f"front accuracy of {fronts._examples(session)}" not in records


def test_tasks_can_be_asked_of_an_active_narrower_network(tmp_path: Path) -> None:
    from prunus.tasks import asked_for, evaluate_tasks

    loaded = loading.load(str(MODEL))  # its embedding is the output matrix too, and lm-eval asks to tie them anew
    family, whole = family_of(loaded.model.config), full(loaded.model.config)
    narrow = SubNetwork(hidden=whole.hidden // 2, layers=whole.layers)
    asked, folder = asked_for(["arc_easy"]), task_folder(tmp_path / "tasks")
    with activate(loaded.model, family, narrow):
        there = evaluate_tasks(loaded.model, loaded.tokenizer, asked, path=folder, limit=4)
    alone = extract(loaded.model, family, narrow)
    assert there["tasks"] == evaluate_tasks(alone, loaded.tokenizer, asked, path=folder, limit=4)["tasks"]
    loaded.model.tie_weights()  # its own again


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"front__objectives": "kl"}, "two or three different ones"),
        ({"front__objectives": "kl,kl"}, "two or three different ones"),
        ({"front__objectives": "bytes,flops"}, "are all costs"),
        ({"front__objectives": "kl,speed"}, "is one of kl, perplexity"),
        ({"front__objectives": "kl,accuracy"}, "no tasks; give --front-tasks"),
        ({"front__objectives": "loss,bytes"}, "no training data"),
        ({"front__objectives": "kl,bytes", "front__least": 0.0005}, "out of reach"),
        ({"front__objectives": "kl,bytes", "method": "magnitude"}, "--front is for our own search"),
        ({"front__objectives": "kl,accuracy", "front__tasks": "arc_esy", "front__tasks_path": "/nowhere"}, "no folder"),
        ({"search__storage": "trials.db"}, "is the URL of a database"),
        ({"search__storage": "sqlite:////nowhere/at/all/x.db"}, "cannot be used"),
    ],
)
def test_a_front_or_a_storage_that_cannot_be_is_refused_before_any_long_work(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "calibrate", lambda s: pytest.fail("calibrated"))
    with pytest.raises(UserError, match=words):
        compress(config(**changes), tmp_path / "run")


def test_two_runs_share_what_a_database_knows(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    one = compress(config(search__storage=url, search__generations=2, search__offspring=4), tmp_path / "one")
    assert not (tmp_path / "one" / "trials.journal").exists()
    spent = one["steps"][3]
    assert spent["name"] == "search" and spent["forward_tokens"] > 0
    two = compress(config(search__storage=url, search__generations=2, search__offspring=4), tmp_path / "two")
    assert two["chosen"][0]["layers"] == one["chosen"][0]["layers"]
    assert two["steps"][3]["forward_tokens"] == 0  # all from the database
    alone = compress(config(search__generations=2, search__offspring=4), tmp_path / "alone")
    assert alone["chosen"][0]["layers"] == one["chosen"][0]["layers"]
    for number, changes in enumerate(({"seed": 1}, {"reform__damping": 0.01}, {"reform__method": "none"})):
        with pytest.raises(UserError, match="belongs to another"):
            compress(config(search__storage=url, **changes), tmp_path / f"other{number}")
    other = compress(config(search__storage=url, seed=1, search__study="other"), tmp_path / "other")
    assert other["chosen"]


def test_volumes_are_shares_of_the_box_of_all_fronts() -> None:
    found = volumes({"a": [(0.0, 30.0), (1.0, 20.0), (4.0, 10.0)], "b": [(2.0, 30.0), (4.0, 20.0)]})
    assert found["a"] == pytest.approx((0.1 * 0.5 + 0.85 * 0.5 + 1.1 * 0.1) / 1.1**2)
    assert found["b"] == pytest.approx((0.1 * 0.5 + 0.6 * 0.1) / 1.1**2)
    assert volumes({"a": [], "b": []}) == {"a": 0.0, "b": 0.0}
    assert fronts.volumes({"a": [(1.0, 1.0)]}) == {"a": 1.0}  # a single point spans a box of its own
