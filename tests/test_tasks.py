"""Tasks by lm-eval: figures with their errors, every example in its order, and data that is opened before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from prunus.errors import UserError
from prunus.models import loading
from prunus.tasks import Asked, asked_for, evaluate_tasks, refuse_few

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL, ROWS = SHARED / "models" / "stories260k-hf", SHARED / "zeroshot" / "arc_easy"
needs_data = pytest.mark.skipif(not (MODEL.is_dir() and ROWS.is_dir()), reason="needs the data beside the project")


def task_folder(folder: Path, name: str = "arc_easy", data: Path = ROWS) -> Path:
    """The folder, with a task file: lm-eval's own ARC-easy under a name, on local data. Reading lm-eval is slow."""
    lm_eval = pytest.importorskip("lm_eval")
    if not ROWS.is_dir():
        pytest.skip("needs the task data beside the project")
    official = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
    folder.mkdir(exist_ok=True)
    raw = {"include": str(official), "task": name, "dataset_path": str(data)}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Path]:
    """Writes task files into one folder."""
    return partial(task_folder, tmp_path)


@needs_data
def test_task_accuracies_have_standard_errors(task: Callable[..., Path]) -> None:
    folder, loaded = task("arc_easy"), loading.load(str(MODEL))
    asked = asked_for(["arc_easy"], shots=0)
    found = evaluate_tasks(loaded.model, loaded.tokenizer, asked, path=folder, limit=12)
    [row] = found["tasks"]
    assert (row["task"], row["metric"], row["shots"], row["n"]) == ("arc_easy", "acc_norm", 0, 12)
    p = row["value"]
    assert row["se"] == pytest.approx(math.sqrt(p * (1 - p) / 11), rel=1e-6)
    assert found["mean"] == p
    [same] = evaluate_tasks(loaded.model, loaded.tokenizer, asked, path=folder, limit=12, each=True)["tasks"]
    assert {k: v for k, v in same.items() if k != "each"} == row
    assert len(same["each"]) == 12 and sum(same["each"]) / 12 == pytest.approx(p)
    with pytest.raises(UserError, match=r"knows no task 'arc_esy' in .*did you mean arc_easy"):
        evaluate_tasks(loaded.model, loaded.tokenizer, asked_for(["arc_esy"]), path=folder)
    with pytest.raises(UserError, match="is no folder"):
        evaluate_tasks(loaded.model, loaded.tokenizer, asked, path=folder / "none")


@needs_data
def test_several_numbers_of_shots_at_once(task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task has its own, and its data is there before the first forward."""
    folder, loaded = task("one"), loading.load(str(MODEL))
    task("two")
    task("three", ROWS.parent / "nowhere")
    asked = (Asked("one", 0, "acc"), Asked("two", 1, "acc_norm"))
    rows = evaluate_tasks(loaded.model, loaded.tokenizer, asked, path=folder, limit=4)["tasks"]
    assert [(row["task"], row["shots"], row["metric"]) for row in rows] == [("one", 0, "acc"), ("two", 1, "acc_norm")]
    monkeypatch.setattr(loaded.model, "forward", lambda *args, **more: pytest.fail("went forward"))
    with pytest.raises(UserError, match=r"the data of one, three cannot be read .*--tasks-path"):
        evaluate_tasks(loaded.model, loaded.tokenizer, (asked[0], Asked("three", 1, "acc")), path=folder, limit=4)


@needs_data
def test_too_few_examples_are_refused(task: Callable[..., Path]) -> None:
    asked = asked_for(["arc_easy"])
    refuse_few(asked, task("arc_easy"), 12)
    with pytest.raises(UserError, match=r"arc_easy has \d+ examples, and the first 100000 are taken"):
        refuse_few(asked, task("arc_easy"), 100_000)


def test_examples_of_groups_and_of_several_filters_stand_in_their_order() -> None:
    from prunus.tasks import _each

    rows = [{"doc_id": k, "filter": "strict", "acc": float(k)} for k in (10, 2)]
    other = {"doc_id": 2, "filter": "loose", "acc": 9.0}
    samples = {"mmlu_b": [*rows, other], "mmlu_a": [{"doc_id": 0, "filter": "strict", "acc": 7}], "boolq": []}
    assert _each(samples, "mmlu", "acc", "strict") == [7.0, 2.0, 10.0]
    assert _each(samples, "mmlu", "word_perplexity", "strict") is None  # a figure of all examples together
    assert _each(samples, "boolq", "acc", "strict") is None


def test_the_gain_over_another_model_is_of_paired_examples() -> None:
    from prunus.tasks import difference

    own = {"a": {"each": [1, 1, 0, 1]}, "b": {"each": [0.5, 0.0]}}
    other = {"a": {"each": [1, 0, 0, 0]}, "b": {"each": [0.0, 0.0]}}
    gain, error = difference(own, other) or (0, 0)
    assert gain == pytest.approx((2 / 4 + 1 / 4) / 2)
    # gains 0 1 0 1: variance 1/3, of the mean 1/12; .5 0: variance 1/8, of the mean 1/16
    assert error == pytest.approx(math.sqrt(1 / 12 + 1 / 16) / 2)
    assert difference(own, own) == (0, 0)
    assert difference(own, {"c": {"each": [1, 0]}}) is None
    assert difference(own, {"a": {"each": [1, 0]}, "b": {"each": [1, 0]}}) is None
    assert difference({"a": {"each": None}}, {"a": {"each": None}}) is None
