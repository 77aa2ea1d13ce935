"""Journals and databases: who computes what, what a killed worker leaves behind, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from toy import Toy, blocks, llama_space

from prunus.errors import UserError
from prunus.searching import storage
from prunus.searching.claims import Key, LockClaims, TrialClaims
from prunus.searching.options import check_storage
from prunus.searching.search import LevelSettings, levels
from prunus.searching.study import Record
from prunus.subnetwork import SubNetwork

KEYS: list[Key] = [(f"{k:016x}", 0, 1) for k in range(1, 7)]


def place(tmp_path: Path, kind: str) -> str:
    return f"sqlite:///{tmp_path}/trials.db" if kind == "sqlite" else str(tmp_path / "trials.journal")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BEAT", 1)
    monkeypatch.setattr(storage, "GRACE", 4)


def search_in(where: str | None, toy: Toy, **given: str) -> object:
    space = toy.space
    record = Record.open(where, space, costs={"parameters": blocks}, belongs_to={"model": "toy", **given}, n_workers=2)
    settings = LevelSettings(generations=3, offspring=6)
    return levels(space, toy, blocks, space.window(blocks, 0.5), record=record, settings=settings)


def test_a_database_resumes_as_a_journal_does(tmp_path: Path) -> None:
    where, toy, again = place(tmp_path, "sqlite"), Toy(llama_space(), noise=0.1), Toy(llama_space(), noise=0.1)
    found = search_in(where, toy)
    assert search_in(where, again) == found
    assert again.n_calls == 0
    assert search_in(place(tmp_path, "journal"), Toy(llama_space(), noise=0.1)) == found


class Mortal(Toy):
    """Takes its time, and dies as by kill -9 in the middle of an evaluation."""

    dies_after: int | None = None
    began: Any = None  # an event

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[Sequence[float]]:
        for score in super().__call__(subs, draw, rung):
            time.sleep(0.005)
            if self.n_calls > 3:
                self.began.set()
            if self.dies_after is not None and self.n_calls > self.dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield score


def _work(where: str, out: Path, dies_after: int | None, began: Any) -> None:
    """One process; the one that lives waits for the other to begin, which might get nothing done on a busy machine."""
    toy = Mortal(llama_space(), noise=0.1)
    toy.dies_after, toy.began = dies_after, began
    if dies_after is None:
        began.wait(60)
    found = search_in(where, toy)
    out.write_text(f"{toy.n_calls} {found}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_of_two_processes_one_is_killed(kind: str, impatient: None, tmp_path: Path) -> None:
    """The same with a tiny model, and processes that share nothing, in test_workers.py."""
    where, context = place(tmp_path, kind), multiprocessing.get_context("fork")
    began = context.Event()
    victim = context.Process(target=_work, args=(where, tmp_path / "victim", 6, began))
    other = context.Process(target=_work, args=(where, tmp_path / "other", None, began))
    victim.start()
    other.start()
    victim.join(300)
    other.join(300)
    assert (victim.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    alone = Toy(llama_space(), noise=0.1)
    whole = search_in(None, alone)
    n, _, found = (tmp_path / "other").read_text().partition(" ")
    assert found == str(whole)
    record = Record.open(where, llama_space(), costs={"parameters": blocks}, belongs_to={"model": "toy"})
    keys = [(t.subnetwork.key(), t.draw, t.rung) for t in record.trials()]
    assert len(set(keys)) == alone.n_calls
    assert int(n) <= alone.n_calls
    if kind == "journal":  # in a database a process that gets no processor time for GRACE seconds counts as dead
        assert len(keys) == len(set(keys))
        assert int(n) == alone.n_calls - 6  # what the victim died in was done again, what it had finished was not
    assert not [t for t in record.study.trials if t.state == optuna.trial.TrialState.RUNNING]


# ------------------------------------------------------------------------------------------------------ claims


def claims_on(where: str) -> TrialClaims:
    backend = storage.database(where)
    return TrialClaims(backend, optuna.create_study(study_name="a", storage=backend, load_if_exists=True))


def test_what_one_has_claimed_no_other_gets_until_it_is_given_back(tmp_path: Path) -> None:
    one, two = (claims_on(place(tmp_path, "sqlite")) for _ in range(2))
    with one.take(KEYS, 4) as first:
        assert first == KEYS[:4]
        with two.take(KEYS, 4) as second:
            assert second == KEYS[4:]
            with one.take(KEYS, 4) as third:
                assert third == []
    with two.take(KEYS, 9) as again:
        assert again == KEYS


def test_of_two_that_claim_at_once_the_first_number_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look before either has written: the moment that a look and a write, one after the other, leave open."""
    one, two = (claims_on(place(tmp_path, "sqlite")) for _ in range(2))
    looked, got = threading.Barrier(2), dict[str, list[Key]]()
    held = TrialClaims._held

    def look(self: TrialClaims, before: int | None = None) -> set[str]:
        found = held(self, before)
        if before is None:
            assert not found
        looked.wait(20)
        return found

    monkeypatch.setattr(TrialClaims, "_held", look)

    def claim(name: str, claims: TrialClaims) -> None:
        with claims.take(KEYS, 3) as mine:
            got[name] = mine
            looked.wait(20)  # neither gives back before both have looked

    threads = [threading.Thread(target=claim, args=pair) for pair in (("one", one), ("two", two))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(got.values(), key=len) == [[], KEYS[:3]]


@pytest.mark.parametrize("beats", [True, False])
def test_a_dead_claim_is_taken_over(beats: bool, impatient: None, tmp_path: Path) -> None:
    """One whose heart has stopped, and one that died before its first beat; a living one is left alone."""
    where = place(tmp_path, "sqlite")
    dead, two, living = (claims_on(where) for _ in range(3))
    number = dead._backend.create_new_trial(
        dead._id,
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, user_attrs={"claims": [" ".join(map(str, KEYS[0]))]}
        ),
    )
    if beats:
        dead._backend.record_heartbeat(number)
        dead._backend.set_trial_user_attr(number, "beats", True)
    with living.take(KEYS[1:2], 1) as theirs:
        assert theirs == KEYS[1:2]
        start = time.monotonic()
        while time.monotonic() < start + 20:
            with two.take(KEYS[:2], 2) as mine:
                if mine:
                    break
            time.sleep(0.1)
        assert mine == KEYS[:1]
        assert time.monotonic() - start > 1


def test_locks_of_a_process_are_free_after_an_error(tmp_path: Path) -> None:
    claims = LockClaims(tmp_path / "claims")
    with pytest.raises(KeyboardInterrupt), claims.take(KEYS, 2):
        raise KeyboardInterrupt
    with claims.take(KEYS, 9) as mine:
        assert mine == KEYS


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:///", "names no file: the study would lie in this process's memory"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:/trials.db", "is the URL of a database .* ends in .journal; given 'sqlite:/trials.db'"),
        ("trials.db", "ends in .journal"),
        ("://host/db", "is the URL of a database"),
        ("postgresql://me:secret@host/db", r"with its password; write \$\{NAME\} in its place"),
    ],
)
def test_a_storage_that_is_none_is_refused_with_the_configuration(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        check_storage(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "url", [None, "a/b.journal", "sqlite:////a/b.db", "postgresql://me@host/db", "postgresql://me:${PW}@host/db"]
)
def test_a_storage_that_may_be_is_let_through(url: str | None) -> None:
    check_storage(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("oracel://host/db", "no kind of database is called 'oracel'"),
        ("mysql+nothing://host/db", "no kind of database"),
        ("sqlite:////nowhere/at/all/trials.db", "cannot be used: .*unable to open database file"),
        ("postgresql://me:${PRUNUS_NO_SUCH_NAME}@host/db", "variable PRUNUS_NO_SUCH_NAME, which is not set"),
        ("postgresql://host:port/db", "is no URL of a database"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        storage.database(url)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match="needs the Python module psycopg2, which is not installed; pip install 'psy"):
        storage.database("postgresql+psycopg2://host/db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.db").write_text("not a database" * 100)
    with pytest.raises(UserError, match=r"cannot be used: .*not a database"):
        storage.database(place(tmp_path, "sqlite"))


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_study_of_another_model_or_space_is_refused(kind: str, tmp_path: Path) -> None:
    where, space = place(tmp_path, kind), llama_space()
    Record.open(where, space, belongs_to={"model": "a"})
    with pytest.raises(UserError, match=r"another model \(a, now b\).*another search.study"):
        Record.open(where, space, belongs_to={"model": "b"})
    with pytest.raises(UserError, match="another space"):
        Record.open(where, llama_space(mlp_step=16), belongs_to={"model": "a"})
    other = Record.open(where, space, belongs_to={"model": "b"}, study="second")  # a study of its own
    assert other.study.study_name == "second kl_nats"


def test_a_password_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNUS_TEST_PLACE", str(tmp_path))
    storage.database("sqlite:///${PRUNUS_TEST_PLACE}/trials.db")
    assert (tmp_path / "trials.db").is_file()


def test_processes_that_make_the_same_tables_at_once_come_through(tmp_path: Path) -> None:
    where, failed = place(tmp_path, "sqlite"), list[BaseException]()

    def open_it() -> None:
        try:
            storage.database(where)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
