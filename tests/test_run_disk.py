"""Run directories when the disk is full, and the accounts of what each step took."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_run import SOURCE, config, never

from prunus.errors import UserError
from prunus.recording import artefact
from prunus.recording.run import Run, read_manifest


@pytest.mark.parametrize("rust", [False, True])
def test_a_full_disk_keeps_nothing_half_written(tmp_path: Path, rust: bool) -> None:
    full = Exception("I/O error: No space left on device (os error 28)") if rust else OSError(errno.ENOSPC, "full")

    def save(value: Any, path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        raise full

    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("calibrate", "tokens.json", lambda: [1])
        with pytest.raises(UserError, match="disk is full"):
            run.do("extract", "models/keep80", lambda: 1, save, lambda path: 1)
        assert not list((tmp_path / "run").rglob("half"))
        assert not (tmp_path / "run/models/keep80").exists()
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        assert run.do("calibrate", "tokens.json", never) == [1]


def test_a_full_disk_while_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest itself does not fit: the old one stays, and the artefact does not count."""
    original = Path.write_text

    def write_text(self: Path, *args: Any, **named: Any) -> int:
        if self.name == "manifest.json":
            original(self, "{")
            raise OSError(errno.ENOSPC, "full")
        return original(self, *args, **named)

    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        monkeypatch.setattr(Path, "write_text", write_text)
        with pytest.raises(UserError, match="disk is full"):
            run.do("calibrate", "tokens.json", lambda: [1])
        monkeypatch.undo()
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        assert not run.done("tokens.json")
        assert run.do("calibrate", "tokens.json", lambda: [2]) == [2]


def test_a_bug_is_not_dressed_up_as_a_full_disk(tmp_path: Path) -> None:
    def save(value: Any, path: Path) -> None:
        raise TypeError("a bug")

    with Run.open(tmp_path / "run", config(), SOURCE) as run, pytest.raises(TypeError, match="a bug"):
        run.do("score", "scores", lambda: 1, save, lambda path: 1)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EISDIR, "a directory stands where a file is needed"),
        (errno.ENOTEMPTY, "a directory with other files stands there"),
        (errno.ENOENT, "there is no such file or folder"),
    ],
)
def test_what_stands_in_the_way_is_one_sentence(number: int, words: str) -> None:
    with pytest.raises(UserError, match=f"cannot write 'x': {words}"), artefact.writing("x"):
        raise OSError(number, os.strerror(number))


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.require_space(1, "a few bytes")
        with pytest.raises(UserError, match=r"the checkpoints need .* GB"):
            run.require_space(10**18, "the checkpoints")


def test_a_text_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact.write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(artefact, "flush", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(UserError, match="disk is full"):
        artefact.write_text(tmp_path / "a.json", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "old"}


def test_each_step_is_accounted_for(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:

        def work(n: int) -> list[int]:
            run.count_tokens(n)
            block = bytearray(60_000_000)
            time.sleep(0.05)
            return [len(block)]

        run.do("score", "scores.json", lambda: work(10))
        for layer in range(2):
            run.do("reform", f"levels/{layer}.json", lambda: work(5))
        costs = run.costs()
    assert list(costs) == ["score", "reform"]
    assert costs["score"]["forward_tokens"] == costs["reform"]["forward_tokens"] == 10
    assert costs["score"]["seconds"] >= 0.05 and costs["reform"]["seconds"] >= 0.1
    assert costs["score"]["peak_bytes"] > 60_000_000
    recorded = read_manifest(tmp_path / "run")
    assert recorded["environments"][recorded["artefacts"]["scores.json"]["environment"]]["torch"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot reset the peak")
def test_peak_memory_is_that_of_the_step(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("score", "large.json", lambda: len(bytearray(b"1" * 300_000_000)))
        run.do("reform", "small.json", lambda: 1)
        costs = run.costs()
    assert costs["score"]["peak_bytes"] - costs["reform"]["peak_bytes"] > 250_000_000


FREEING = """
import resource, sys
from prunus.machine import keep_freed_memory, reset_peak
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    block = b"1" * 100_000_000
    del block
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
full = resident()
reset_peak()
print(kept, faults * resource.getpagesize() // 1_000_000, (full - resident()) // 1_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_until_the_next_measurement() -> None:
    def faulted(how: str, **environment: str) -> tuple[str, int, int]:
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
        out = subprocess.check_output([sys.executable, "-c", FREEING, how], text=True, env=plain | environment).split()
        return out[0], int(out[1]), int(out[2])

    kept, new, given_back = faulted("keep")
    assert kept == "True" and new < 150 and given_back > 90  # MB: one block's pages of five, and none in the end
    assert faulted("plain")[1] > 450
    assert faulted("keep", MALLOC_ARENA_MAX="2")[0] == "False"  # whoever sets the allocator up is left alone


def test_notes_and_hashes_last(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.note("tokens_sha256", "ff")
        run.do("score", "scores.json", lambda: 1)
        first = run.sha256("scores.json")
        assert len(first) == 64
    with Run.reopen(tmp_path / "run") as run:
        assert run.notes == {"tokens_sha256": "ff"}
        assert run.sha256("scores.json") == first
