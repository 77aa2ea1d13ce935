"""Settings of a training that would change nothing are refused; states are written in time, where there is room."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_training import job

from prunus.cli import app
from prunus.errors import UserError
from prunus.training import states, telling
from prunus.training.learning import TrainConfig
from prunus.training.loop import fit

DATA: dict[str, Any] = {"data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("settings", "asked", "words"),
    [
        ({"rank": 8}, {}, "--rank would change nothing: nothing is trained; give --train FILE"),
        ({"space": "llama", "draws": 3}, {}, "--space, train.draws would change nothing: nothing is trained"),
        ({**DATA, "adapt": "attention"}, {}, "--adapt would change nothing: without a rank all weights"),
        ({**DATA, "alpha": 4.0, "dropout": 0.1}, {}, "train.alpha, train.dropout would change nothing"),
        ({**DATA, "strategy": "standard", "sampler": "grid"}, {}, "--sampler would change nothing: --strategy"),
        ({"rank": 8, "lr": 1e-3}, {"asked": ("train.lr",)}, "--lr would change nothing: nothing is trained"),
        ({**DATA, "strategy": "standard", "ce": 0.5}, {}, "--ce would change nothing: nobody teaches"),
        ({**DATA, "divergence": "js"}, {"one": True, "teacher": False}, "--divergence would change nothing"),
        ({**DATA, "strategy": "random", "kd": 2.0}, {}, "--kd would change nothing: nobody teaches"),
        ({**DATA, "strategy": "random", "drawn": 3}, {}, "train.drawn would change nothing: --strategy random"),
        ({**DATA, "sampler": "random", "bins": 4}, {}, "train.bins would change nothing: --sampler random"),
        ({**DATA, "sampler": "grid-params", "draws": 4}, {}, "train.draws would change nothing: --sampler grid-params"),
        ({**DATA, "holdout": 0, "eval_every": 5}, {}, "train.eval_every would change nothing: no window is held out"),
        ({"data": "a.txt", "packing": False}, {}, "train.packing would change nothing: a.txt is one text"),
        ({**DATA, "bins": 4}, {"one": True}, "train.bins would change nothing: it is about sub-networks"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(
    settings: dict[str, Any], asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        TrainConfig(**settings).refuse_idle(**asked)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, {}),
        ({**DATA, "rank": 8, "adapt": "attention", "alpha": 4.0}, {}),
        ({**DATA, "strategy": "standard", "teacher": "dense", "ce": 0.5}, {}),
        ({**DATA, "strategy": "standard", "space": "llama"}, {}),  # a search may stay in that space
        ({**DATA, "strategy": "sandwich-grid", "sampler": "grid", "bins": 4}, {}),
        ({**DATA, "divergence": "js", "ce": 0.5}, {"one": True}),
        ({**DATA, "lr": 1e-3, "rank": 4}, {"one": True, "teacher": False}),
        ({**DATA, "strategy": "random", "teacher": "dense", "divergence": "js"}, {}),
        ({"data": "a.jsonl", "column": "body", "packing": False}, {}),
        ({**DATA, "strategy": "standard", "bins": 4}, {"asked": ("train.strategy",)}),  # bins are the run's own
    ],
)
def test_settings_that_change_something_are_not(settings: dict[str, Any], asked: dict[str, Any]) -> None:
    TrainConfig(**settings).refuse_idle(**asked)


def test_a_flag_that_trains_nothing_ends_the_command_before_any_work(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compress", "demo", "--out", str(tmp_path / "run"), "--rank", "8"])
    assert done.exit_code == 2
    assert "give --train FILE" in done.output
    assert not (tmp_path / "run").exists()


def test_calibrated_is_short_for_the_default() -> None:
    assert TrainConfig(sampler="calibrated") == TrainConfig()


def test_a_state_is_written_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seldom = {"save_every": 100, "steps": 3, "length": 16, "batch": 2, "precision": "float32", "holdout": 0}
    config = TrainConfig(**seldom)  # type: ignore[arg-type]
    fit(job(tmp_path / "quick", config=config))
    assert sorted(path.name for path in (tmp_path / "quick").glob("checkpoint-*")) == ["checkpoint-3"]
    monkeypatch.setattr(telling, "SAVE_SECONDS", 0)
    fit(job(tmp_path / "slow", config=config))
    assert sorted(path.name for path in (tmp_path / "slow").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_states_that_the_disk_cannot_take_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    one = job(tmp_path / "out")
    each = 12 * sum(p.numel() for p in one.model.parameters())
    monkeypatch.setattr(states.shutil, "disk_usage", lambda path: usage(0, 0, 3 * each - 1))
    with pytest.raises(UserError, match=r"states of this training need .* make room"):
        fit(one)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    monkeypatch.setattr(states.shutil, "disk_usage", lambda path: usage(0, 0, 3 * each))
    states.refuse_full_disk(tmp_path / "out", each // 12)


def test_states_of_another_number_of_processes_are_kept_and_named(tmp_path: Path) -> None:
    states.refuse_processes(tmp_path, 2)  # nothing is there
    state = tmp_path / "checkpoint-7"
    state.mkdir()
    (state / states.WHOLE).write_text("{}")
    (tmp_path / states.RECORD).write_text(json.dumps({"processes": 2}))
    states.refuse_processes(tmp_path, 2)
    with pytest.raises(
        UserError, match="a training of 2 processes, stopped after step 7, and these are 1: start as many"
    ):
        states.refuse_processes(tmp_path, 1)
    assert state.is_dir()
