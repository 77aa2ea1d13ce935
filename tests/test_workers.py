"""Two real processes on one study of a tiny model, one of them killed: the other comes to what one alone comes to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import worker

from prunus.searching import storage


def trials_of(where: str, name: str = "kl_nats") -> list[optuna.trial.FrozenTrial]:
    opened = storage.database(where) if storage.is_url(where) else storage.journal(Path(where))
    return optuna.load_study(study_name=name, storage=opened).trials


# Real processes, each of which imports torch: some ten seconds.
@pytest.mark.parametrize(("kind", "method"), [("journal", "levels"), ("sqlite", "tpe")])
def test_a_worker_that_is_killed_changes_nothing(kind: str, method: str, tmp_path: Path) -> None:
    where = f"sqlite:///{tmp_path}/trials.db" if kind == "sqlite" else str(tmp_path / "trials.journal")
    command = [sys.executable, worker.__file__, where]
    victim = subprocess.Popen([*command, str(tmp_path / "victim"), method, "4"])
    other = subprocess.Popen([*command, str(tmp_path / "other"), method])
    assert victim.wait(120) == -signal.SIGKILL
    assert other.wait(120) == 0
    assert not (tmp_path / "victim").exists()
    found = json.loads((tmp_path / "other").read_text())
    alone = worker.objective()
    whole, record = worker.search_in(None, method, alone, n_workers=1)
    assert found["found"] == json.loads(json.dumps(whole))
    own = [t for t in trials_of(where) if t.values is not None]
    keys = [(t.user_attrs["key"], t.user_attrs["draw"], t.user_attrs["rung"]) for t in own]
    assert len(set(keys)) == len(record.trials()) == alone.n_calls
    assert found["n_calls"] <= alone.n_calls
    if kind == "journal":  # in a database a process that gets no processor time for GRACE seconds counts as dead
        assert len(keys) == len(set(keys))
        assert found["n_calls"] == alone.n_calls - 4  # all but what the victim had finished; the one it died in, again
    scores = {(t.subnetwork.key(), t.draw, t.rung): t.value for t in record.trials()}
    assert {key: t.values[0] for key, t in zip(keys, own, strict=True)} == scores  # also of what was computed twice
    assert not [t for t in trials_of(where) if t.state == optuna.trial.TrialState.RUNNING]
