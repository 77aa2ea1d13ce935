"""One rival as a run of its own: its checkpoints and report, and what it cannot be asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import config, needs_model, texts
from transformers import AutoModelForCausalLM

from prunus.baselines import rivals
from prunus.baselines.table import TABLE
from prunus.errors import UserError
from prunus.pipeline import compress
from prunus.texts import calibration

__all__ = ["texts"]  # a fixture


@needs_model
@pytest.mark.parametrize("method", ["flap", "slicegpt"])
def test_a_rival_as_a_run(method: str, texts: tuple[str, str], tmp_path: Path) -> None:
    asked = config(texts[0], method=method, keep=(0.8, 0.6), test_text=texts[1], test_length=64)
    data = compress(asked, tmp_path / "run")
    assert [n["name"] for n in data["chosen"]] == ["keep-0.8", "keep-0.6"]
    for network in data["chosen"]:
        path = tmp_path / "run" / network["path"]
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        assert sum(p.numel() for p in model.parameters()) == network["parameters"]
        assert json.loads((path / "prunus.json").read_text())["method"] == method
        assert method in (path / "README.md").read_text()
        assert network["kl_nats"] > 0
    assert data["chosen"][0]["kl_nats"] < data["chosen"][1]["kl_nats"]
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"Method: **{method}**" in page
    assert TABLE[method].paper in page
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "models").rglob("*.safetensors")}
    assert compress(asked, tmp_path / "run")["chosen"] == data["chosen"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "models").rglob("*.safetensors")}


@needs_model
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nowhere.txt", "cannot read the text file"),
        ("calibration.txt", "test text and calibration text at once"),
        ("copy.txt", "has the same bytes as the calibration text"),
        ("longer.txt", "of the calibration text stands in the test text"),
    ],
)
def test_a_rival_is_not_scored_on_what_it_was_calibrated_on(
    file: str, words: str, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "copy.txt").write_bytes(Path(texts[0]).read_bytes())
    (tmp_path / "longer.txt").write_text("Once. " + Path(texts[0]).read_text())
    if file != "longer.txt":  # which only tokens tell
        monkeypatch.setattr(calibration, "calibration_tokens", lambda *_, **__: pytest.fail("too late"))
    asked = config(texts[0], method="magnitude", keep=(0.8,), test_text=str(tmp_path / file), test_length=64)
    with pytest.raises(UserError, match=words):
        compress(asked, tmp_path / "run")
    assert not (tmp_path / "run" / "models").exists()


@needs_model
def test_a_text_that_is_refused_leaves_a_rivals_run_as_it_was(texts: tuple[str, str], tmp_path: Path) -> None:
    asked = config(texts[0], method="magnitude", keep=(0.8,))
    compress(asked, tmp_path / "run")
    with pytest.raises(UserError, match="cannot read the text file"):
        compress(replace(asked, test_text=str(tmp_path / "nowhere.txt")), tmp_path / "run")
    assert (tmp_path / "run" / "evaluation" / "dense.json").is_file()


@needs_model
def test_a_run_scores_on_the_column_that_it_calibrates_on(texts: tuple[str, str], tmp_path: Path) -> None:
    paths = [Path(file).with_suffix(".jsonl") for file in texts]
    for file, path in zip(texts, paths, strict=True):
        path.write_text(json.dumps({"text": "No.", "story": Path(file).read_text()}))
    own = {"method": "magnitude", "keep": (0.8,), "test_length": 64}
    asked = config(str(paths[0]), calibration__column="story", test_text=str(paths[1]), **own)
    found = compress(asked, tmp_path / "run")["dense"]["perplexity"]
    plain = compress(config(texts[0], test_text=texts[1], **own), tmp_path / "plain")["dense"]["perplexity"]
    assert [*found.values()] == [*plain.values()]


def test_what_a_rival_cannot_be_asked() -> None:
    for changes, words in (
        ({"keep_of": "all"}, "shares of the decoder blocks"),
        ({"budget__speedup": (1.5,)}, "shares of the decoder blocks"),
        ({"uniform": True}, "--uniform is for our own search"),
        ({"train__data": "rows.jsonl"}, "flap is not trained"),
        ({"method": "flip"}, "did you mean 'flap'"),
    ):
        with pytest.raises(UserError, match=words):
            rivals.check(config("generated", **{"method": "flap", **changes}))
    with pytest.raises(UserError, match="has no error curves"):
        rivals.refuse_step(config("generated", method="flap"), "pick")
    rivals.refuse_step(config("generated"), "pick")
    with pytest.raises(UserError, match="cannot serve olmo2"):
        rivals.refuse(TABLE["slicegpt"], "olmo2", (0.8,))
