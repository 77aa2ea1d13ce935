"""What a bench refuses: before any work what cannot be asked, and rows of another text than the others'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bench import config, needs_model, plan, texts

from prunus.baselines import bench
from prunus.baselines.bench import run
from prunus.baselines.table import OURS
from prunus.errors import UserError

__all__ = ["texts"]  # a fixture


def renoted(out: Path, *kinds: str) -> None:
    """Make a bench one of an earlier version, without notes of these kinds."""
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["notes"] = {k: v for k, v in manifest["notes"].items() if not k.startswith(kinds)}
    path.write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------- other texts


@needs_model
@pytest.mark.parametrize("first", ["magnitude", OURS])
def test_two_calibration_texts_of_one_name_do_not_meet(first: str, texts: tuple[str, str], tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "d2" / "calibration.txt"
    other.parent.mkdir()
    other.write_text(Path(texts[0]).read_text()[5000:])
    run(config(texts[0]), plan(texts, first, keeps=(0.8,)), out)
    refused = r"made with another text of the name 'calibration\.txt'; give that one"
    for method in (first, "shortgpt"):  # a row that is there, and one that is not
        with pytest.raises(UserError, match=refused):
            run(config(texts[0]), plan(texts, method, keeps=(0.8,), calibrations=(str(other),)), out)
    renoted(out, bench.SOURCES)
    with pytest.raises(UserError, match=refused):  # by its tokens
        run(config(texts[0]), plan(texts, "shortgpt", keeps=(0.8,), calibrations=(str(other),)), out)
    rows = run(config(texts[0]), plan(texts, first, "shortgpt", keeps=(0.8,)), out)["rows"]
    assert len({row["token_hash"] for row in rows[1:]}) == 1


@needs_model
def test_a_test_text_stays_what_it_was(texts: tuple[str, str], tmp_path: Path) -> None:
    out, text = tmp_path / "out", Path(texts[1])
    before = text.read_text()
    run(config(texts[0]), plan(texts, "magnitude", keeps=(0.8,)), out)
    text.write_text(before[1000:])
    with pytest.raises(UserError, match=r"made with another text of the name 'stories\.txt'"):
        run(config(texts[0]), plan(texts, "shortgpt", keeps=(0.8,)), out)
    text.write_text(before)
    renoted(out, bench.TEXTS)  # benches of earlier versions go on
    assert len(run(config(texts[0]), plan(texts, "shortgpt", keeps=(0.8,)), out)["rows"]) == 3
    text.write_text(before[1000:])
    with pytest.raises(UserError, match="made with another text"):  # from then on
        run(config(texts[0]), plan(texts, "shortgpt", keeps=(0.8,)), out)


@needs_model
def test_a_test_text_is_read_from_the_column_of_the_calibration_text(texts: tuple[str, str], tmp_path: Path) -> None:
    paths = [Path(file).with_suffix(".jsonl") for file in texts]
    for file, path in zip(texts, paths, strict=True):
        path.write_text(json.dumps({"text": "No.", "story": Path(file).read_text()}))
    asked = plan((str(paths[0]), str(paths[1])), "magnitude", keeps=(0.8,), texts=(str(paths[1]), texts[1]))
    dense = run(config(str(paths[0]), calibration__column="story"), asked, tmp_path / "out")["rows"][0]
    assert dense["perplexity"]["stories.jsonl"] == dense["perplexity"]["stories.txt"]


# ---------------------------------------------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_of": "all"}, "the same for all methods; give --keep, and leave keep_of"),
        ({"search__constraint": "bytes"}, "leave keep_of, search.constraint and budgets out"),
        ({"budget__speedup": (1.5,)}, "leave keep_of, search.constraint and budgets out"),
        ({"train__data": "rows.jsonl"}, "nothing is trained in a bench, ours included, given train.data 'rows.jsonl'"),
        ({"search__storage": "shared.journal"}, "what its network took alone"),
        ({"front__objectives": ("kl", "bytes")}, "a bench has no fronts"),
        ({"uniform": True}, "flap would not keep to it"),
    ],
)
def test_settings_that_only_some_methods_would_follow(
    changes: dict[str, Any], words: str, texts: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        run(config(texts[0], **changes), plan(texts, OURS, "flap"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_model
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score__method": "wanda"}, "--score wanda would order nothing"),
        ({"train__rank": 8}, "--rank would change nothing"),
        ({"search__workers": 2}, "search.workers is 2"),
        ({"calibration__length": 4096}, "4096"),
    ],
)
def test_settings_that_no_run_of_ours_takes_are_no_row(
    changes: dict[str, Any], words: str, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "perplexity", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match=words):
        run(config(texts[0], **changes), plan(texts, OURS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_model
def test_a_share_that_our_search_cannot_reach_is_a_row_and_the_others_go_on(
    texts: tuple[str, str], tmp_path: Path
) -> None:
    found = run(config(texts[0]), plan(texts, OURS, keeps=(0.8, 1e-4)), tmp_path / "out")
    rows = {row["kept"]: row for row in found["rows"] if row["method"] == OURS}
    assert rows[0.8]["done"]
    assert not rows[1e-4]["done"] and "the share is out of reach" in rows[1e-4]["refused"]


@needs_model
def test_unknown_tasks_are_refused_before_anything_is_measured(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(bench, "perplexity", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "tasks").mkdir()
    asked = plan(texts, "magnitude", tasks=("no_such",), task_path=str(tmp_path / "tasks"))
    with pytest.raises(UserError, match="knows no task 'no_such'"):
        run(config(texts[0]), asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
