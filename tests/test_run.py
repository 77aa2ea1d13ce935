"""A run directory survives whatever happens to the process that writes it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from prunus import artefact
from prunus.config import CompressConfig, nest
from prunus.errors import UserError
from prunus.run import Run, read_manifest

SOURCE = {"id": "tiny", "sha256": "ab" * 32, "kind": "directory"}


def config(**changes: Any) -> dict[str, Any]:
    return CompressConfig.from_dict({"model": "tiny", **nest(changes)}).to_dict()


def never() -> Any:
    raise AssertionError("a finished step was computed again")


# ----------------------------------------------------------------------------------------------------------- resuming


def test_a_finished_step_is_loaded_not_computed(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        first = run.do("score", "scores.json", lambda: {"a": (1, 2)})
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        assert run.do("score", "scores.json", never) == first == {"a": [1, 2]}


def test_tensors_come_back_equal(tmp_path: Path) -> None:
    import torch

    tensors = {"ids": torch.arange(6).reshape(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16)}
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("calibrate", "tokens.safetensors", lambda: tensors)
        again = run.do("calibrate", "tokens.safetensors", never)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in again)


def test_other_inputs_make_an_artefact_again(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("reform", "levels/00.json", lambda: 1, inputs={"scores": "aa"})
        assert run.do("reform", "levels/00.json", never, inputs={"scores": "aa"}) == 1
        assert run.do("reform", "levels/00.json", lambda: 2, inputs={"scores": "bb"}) == 2
        assert list((tmp_path / "run/levels").iterdir()) == [tmp_path / "run/levels/00.json"]


def test_an_artefact_may_be_a_directory(tmp_path: Path) -> None:
    def save(words: dict[str, str], path: Path) -> None:
        for name, word in words.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(word)

    def load(path: Path) -> dict[str, str]:
        return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}

    words = {"config.json": "{}", "sub/weights": "0101"}
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("extract", "models/keep80", lambda: words, save, load)
        assert run.do("extract", "models/keep80", never, save, load) == words
        (tmp_path / "run/models/keep80/sub/weights").write_text("0111")
        assert not run.done("models/keep80")
        assert run.do("extract", "models/keep80", lambda: words, save, load) == words
        # somebody may have trained it further in place: that is kept
        assert (tmp_path / "run/models/keep80.changed-1/sub/weights").read_text() == "0111"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone"])
def test_a_damaged_artefact_is_made_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run/scores.json"
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("score", "scores.json", lambda: [1, 2, 3])
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[:-2], "flipped": whole[:-3] + b"7]\n", "empty": b""}[damage])
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        assert not run.done("scores.json")
        assert run.do("score", "scores.json", lambda: [1, 2, 3]) == [1, 2, 3]
    assert path.read_bytes() == whole


# ------------------------------------------------------------------------------------------------------------ dying

WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from prunus import artefact
from prunus.config import CompressConfig
from prunus.run import Run

def work(directory, keep=(0.8,), again=False):
    config = CompressConfig("tiny", keep=keep).to_dict()
    with Run.open(directory, config, {{"id": "tiny", "sha256": "ab" * 32}}) as run:
        if again:
            run.forget("search")
        run.do("calibrate", "tokens.json", lambda: list(range(100)))
        run.grow("search", "trials.journal").open("a").write("trial\\n")
        for k in keep:
            run.do("extract", f"models/{{k}}", lambda: str(k), save, load)
        run.do("report", "report.md", lambda: "# report", inputs={{"keep": list(keep)}})

def save(word, path):
    path.mkdir()
    (path / "weights").write_text(word * 1000)
    (path / "config.json").write_text("{{}}")

def load(path):
    return (path / "weights").read_text()
"""

# os functions that change the disk: the process dies just before, or just after, each call of one of them
DYING = """
os.fsync = lambda handle: None  # a death of the process, not of the machine: and much faster

def dying(n):
    # count the calls that change the disk, and die at the n-th
    seen = [0]
    def tick():
        seen[0] += 1
        if seen[0] == n:
            os._exit(9)
    def wrap(module, name):
        original = getattr(module, name)
        def wrapped(*a, **k):
            tick()
            out = original(*a, **k)
            tick()
            return out
        setattr(module, name, wrapped)
    for name in ("replace", "mkdir", "fsync", "unlink", "rmdir"):
        wrap(os, name)
    wrap(Path, "write_text"); wrap(Path, "mkdir"); wrap(Path, "unlink")
    return seen

n = 1
while True:
    directory = Path(sys.argv[1]) / str(n)
    if sys.argv[2] == "again":
        work(directory)
    child = os.fork()
    if child == 0:
        try:
            dying(n)
            work(directory, **(dict(keep=(0.8, 0.6), again=True) if sys.argv[2] == "again" else {{}}))
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        break
    assert code == 9, code
    keep = (0.8, 0.6) if sys.argv[2] == "again" else (0.8,)
    work(directory, keep=keep)   # opens, goes on, finishes
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and ".prunus" not in p.parts)
    wanted = sorted(["config.yaml", "manifest.json", "report.md", "tokens.json", "trials.journal"]
                    + [f"models/{{k}}/{{f}}" for k in keep for f in ("weights", "config.json")])
    assert names == wanted, (n, names)
    assert not list((directory / ".prunus").glob("partial/*")), n
    for k in keep:
        assert (directory / f"models/{{k}}/weights").read_text() == str(k) * 1000, n
    n += 1
print(n)
"""


def script(tmp_path: Path, *parts: str) -> Path:
    path = tmp_path / "worker.py"
    path.write_text("\n".join(parts).format(root=str(Path(__file__).resolve().parents[1])))
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("story", ["first", "again"])
def test_dying_between_any_two_writes_leaves_a_run_that_goes_on(tmp_path: Path, story: str) -> None:
    """Every point of death in turn: the same command then finishes, and leaves exactly the files of a whole run."""
    path = script(tmp_path, WORKER, DYING)
    done = subprocess.run([sys.executable, path, tmp_path, story], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 50  # that many points of death were tried
