"""A run directory survives whatever happens to the process that writes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from prunus.config import CompressConfig, nest, read_yaml
from prunus.errors import UserError
from prunus.recording.run import Run

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
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from prunus.recording import artefact
from prunus.config import CompressConfig
from prunus.recording.run import Run

def work(directory, keep=(0.8,), again=False):
    config = CompressConfig("tiny", keep=keep).to_dict()
    with Run.open(directory, config, {{"id": "tiny", "sha256": "ab" * 32}}) as run:
        if again:
            run.change("search", {{}}, again=True)
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

# The process dies just before each call that changes the disk, which is just after the one before it.
DYING = """
os.fsync = lambda handle: None  # a death of the process, not of the machine: and much faster

def dying(n):
    seen = [0]
    def tick():
        seen[0] += 1
        if seen[0] == n:
            os._exit(9)
    def wrap(module, name):
        original = getattr(module, name)
        def wrapped(*a, **k):
            tick()
            return original(*a, **k)
        setattr(module, name, wrapped)
    for name in ("replace", "mkdir", "fsync", "unlink", "rmdir"):
        wrap(os, name)
    wrap(Path, "write_text"); wrap(Path, "mkdir"); wrap(Path, "unlink")
    return seen

work(Path(sys.argv[1]) / "warm")  # what is cached once need not be computed in every child
n = 1
while True:
    directory = Path(sys.argv[1]) / str(n)
    if sys.argv[2] == "again":
        shutil.copytree(Path(sys.argv[1]) / "warm", directory)
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
    files = [p.relative_to(directory) for p in directory.rglob("*") if p.is_file() and ".prunus" not in p.parts]
    names = sorted(map(str, files))
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
    assert int(done.stdout) > 40  # that many points of death were tried


def test_kill_dash_nine_in_the_middle(tmp_path: Path) -> None:
    """A real SIGKILL while a step computes: the run opens (no stale lock), and only that step is done again."""
    path = script(
        tmp_path,
        WORKER,
        textwrap.dedent("""
            with Run.open(sys.argv[1], CompressConfig("tiny").to_dict(), {{"id": "tiny", "sha256": "ab" * 32}}) as run:
                run.do("calibrate", "tokens.json", lambda: [1])
                import time
                run.do("score", "scores.json", lambda: (print("in", flush=True), time.sleep(60)))
        """),
    )
    with subprocess.Popen([sys.executable, path, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=rf"process {child.pid} .* is working on"):
            Run.open(tmp_path / "run", config(), SOURCE)
        child.send_signal(signal.SIGKILL)
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        assert run.do("calibrate", "tokens.json", never) == [1]
        assert run.do("score", "scores.json", lambda: [2]) == [2]


def test_an_exception_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("calibrate", "tokens.json", lambda: [1])

        def interrupted() -> Any:
            run.count_tokens(70)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.do("score", "scores.json", interrupted)
        assert not (tmp_path / "run/scores.json").exists()

        def finished() -> Any:
            run.count_tokens(30)
            return [2]

        run.do("calibrate", "tokens.json", never)
        run.do("score", "scores.json", finished)
        assert run.costs()["score"]["forward_tokens"] == 100  # the broken attempt was paid for too


def test_what_is_made_inside_of_another_artefact_is_charged_once(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:

        def inside() -> Any:
            run.count_tokens(7)
            time.sleep(0.2)
            return [1]

        def outside() -> Any:
            run.count_tokens(1)
            return run.do("train", "pool.json", inside)

        run.do("train", "log.json", outside)
        cost = {file: run.manifest["artefacts"][file] for file in ("pool.json", "log.json")}
    assert [one["forward_tokens"] for one in cost.values()] == [7, 1]
    assert cost["log.json"]["seconds"] < 0.2 <= cost["pool.json"]["seconds"]


# ----------------------------------------------------------------------------------------------------------- refusing


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("calibrate", "tokens.json", lambda: [1])
    before = (tmp_path / "run/manifest.json").read_bytes()
    with pytest.raises(UserError) as refused:
        Run.open(tmp_path / "run", config(seed=3, **{"calibration.samples": 8}), SOURCE)
    assert "seed: 0 in the run, 3 now" in str(refused.value)
    assert "calibration.samples: 64 in the run, 8 now" in str(refused.value)
    assert "damping" not in str(refused.value)
    assert "leave them as they are" in str(refused.value)
    assert (tmp_path / "run/manifest.json").read_bytes() == before
    with Run.open(tmp_path / "run", config(), SOURCE) as run:  # the refusal let go of the lock
        run.do("calibrate", "tokens.json", never)


def test_where_to_compute_may_differ(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", config(device="cpu"), SOURCE).close()
    with Run.open(tmp_path / "run", config(device="cuda", **{"search.workers": 2}), SOURCE) as run:
        assert run.config["device"] == "cuda"


def test_a_ratio_that_was_never_searched_may_go_again(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(keep=[0.8]), SOURCE) as run:
        run.do("search", "search/keep-0.8.json", lambda: 8)
    with Run.open(tmp_path / "run", config(keep=[0.8, 0.0001]), SOURCE):
        pass  # out of reach: the command ends with an error here
    with Run.open(tmp_path / "run", config(keep=[0.8]), SOURCE) as run:
        assert run.do("search", "search/keep-0.8.json", never) == 8
        assert run.config["keep"] == [0.8]
    with pytest.raises(UserError, match="keep"):
        Run.open(tmp_path / "run", config(keep=[0.7]), SOURCE)


def test_more_ratios_keep_the_models_and_renew_the_report(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(keep=[0.8]), SOURCE) as run:
        run.do("search", "search/keep-0.8.json", lambda: 8)
        run.do("extract", "models/keep80.json", lambda: 80)
        run.do("report", "report.md", lambda: "one model")
    with Run.open(tmp_path / "run", config(keep=[0.8, 0.6]), SOURCE) as run:
        assert run.do("extract", "models/keep80.json", never) == 80
        assert run.do("report", "report.md", lambda: "two models") == "two models"
    with pytest.raises(UserError, match=r"keep: \[0.8, 0.6\] in the run, \[0.6\] now"):
        Run.open(tmp_path / "run", config(keep=[0.6]), SOURCE)


def test_a_test_text_may_be_added(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        run.do("extract", "models/keep80.json", lambda: 80)
        run.do("evaluate", "evaluation.json", lambda: 1)
    with Run.open(tmp_path / "run", config(test_text="a.txt"), SOURCE) as run:
        run.do("extract", "models/keep80.json", never)
        assert run.do("evaluate", "evaluation.json", lambda: 2) == 2
    with pytest.raises(UserError, match=r"prunus report .*/run --set test_text=b\.txt"):
        Run.open(tmp_path / "run", config(test_text="b.txt"), SOURCE)


def test_settings_of_a_front_matter_once_there_is_one(tmp_path: Path) -> None:
    def asked(*objectives: str, method: str) -> dict[str, Any]:
        return config(front={"objectives": list(objectives), "method": method})

    with Run.open(tmp_path / "run", asked(method="nsga2"), SOURCE) as run:
        run.do("extract", "models/keep80.json", lambda: 80)
    with Run.open(tmp_path / "run", asked(method="tpe"), SOURCE) as run:  # another version's default, say
        run.do("extract", "models/keep80.json", never)
        run.do("report", "report.md", lambda: "no front")
    with Run.open(tmp_path / "run", asked(method="local"), SOURCE) as run:
        run.do("report", "report.md", never)
    with Run.open(tmp_path / "run", asked("kl", "bytes", method="levels"), SOURCE) as run:
        run.do("extract", "models/keep80.json", never)
        run.do("front", "search/front.json", lambda: 1)
    with pytest.raises(UserError, match=r'front\.method: "levels" in the run, "nsga2" now'):
        Run.open(tmp_path / "run", asked("kl", "bytes", method="nsga2"), SOURCE)


def test_another_model_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", config(), SOURCE).close()
    with pytest.raises(UserError, match=r"run of another model: tiny \(sha256 abab.*given other"):
        Run.open(tmp_path / "run", config(), {"id": "other", "sha256": "cd" * 32})
    moved = CompressConfig("elsewhere/tiny").to_dict()
    with Run.open(tmp_path / "run", moved, {**SOURCE, "id": "elsewhere/tiny"}) as run:
        assert run.config["model"] == "elsewhere/tiny"


def test_foreign_files_are_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        Run.open(tmp_path, config(), SOURCE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        Run.open(tmp_path / "thesis.tex", config(), SOURCE)
    with pytest.raises(UserError, match="a file stands where a directory is needed"):
        Run.open(tmp_path / "thesis.tex" / "run", config(), SOURCE)


def test_a_file_in_the_way_is_refused_before_the_work(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config(), SOURCE) as run:
        (tmp_path / "run/scores.json").write_text("mine")
        with pytest.raises(UserError, match="in the way"):
            run.do("score", "scores.json", never)
        (tmp_path / "run/trials.journal").write_text("mine")
        with pytest.raises(UserError, match="in the way"):
            run.grow("search", "trials.journal")
    assert (tmp_path / "run/scores.json").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"prunus_run": 99}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Run.open(tmp_path, config(), SOURCE)


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of Prunus"):
        Run.reopen(tmp_path / "nothing")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        Run.open(tmp_path / "run", config(), SOURCE),
        pytest.raises(UserError, match=rf"process {os.getpid()} .* is working on"),
    ):
        Run.reopen(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ changing


def finished_run(path: Path) -> None:
    with Run.open(path, config(), SOURCE) as run:
        run.do("calibrate", "tokens.json", lambda: 0)
        run.do("score", "scores.json", lambda: 1)
        run.grow("search", "trials.journal").write_text("old trials")
        run.do("search", "chosen.json", lambda: 2)
        run.do("extract", "models/keep80.json", lambda: 3)


def test_a_later_step_may_change_and_takes_what_follows_with_it(tmp_path: Path) -> None:
    finished_run(tmp_path)
    with Run.reopen(tmp_path) as run:
        new = run.change("search", {"search.generations": 50})
        assert new["search"]["generations"] == 50
        assert CompressConfig.from_dict(new).search.generations == 50
        assert run.done("tokens.json")
        assert run.done("scores.json")
        assert not (tmp_path / "chosen.json").exists()
        assert not (tmp_path / "trials.journal").exists()
        assert not (tmp_path / "models/keep80.json").exists()
    assert "generations: 50" in (tmp_path / "config.yaml").read_text()


def test_an_earlier_setting_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path)
    with (
        Run.reopen(tmp_path) as run,
        pytest.raises(
            UserError, match=r"score\.method is \"obs\".*before 'search'.*prunus score .* --set score\.method=wanda"
        ),
    ):
        run.change("search", {"score.method": "wanda"})
    with Run.reopen(tmp_path) as run:
        assert run.done("chosen.json")


def test_more_ratios_and_another_test_text_keep_what_they_can(tmp_path: Path) -> None:
    finished_run(tmp_path)
    with Run.reopen(tmp_path) as run:
        run.do("evaluate", "evaluation.json", lambda: 4)
        run.do("report", "report.md", lambda: "five networks")
        run.change("search", {"keep": (0.9, 0.8, 0.75, 0.7, 0.6, 0.5)})
        assert run.done("chosen.json")
        assert run.done("evaluation.json")
        assert not run.done("report.md")
        run.change("report", {"test_text": "a.txt"})
        assert run.done("models/keep80.json")
        assert not run.done("evaluation.json")
        run.change("search", {"keep": (0.9, 0.7)})  # none of those that go was ever searched
        assert run.done("chosen.json")
        run.do("search", "search/keep-0.7.json", lambda: 5)
        run.change("search", {"keep": (0.9,)})
        assert not run.done("chosen.json")


def test_a_change_that_is_not_admitted_changes_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = (tmp_path / "manifest.json").read_text()

    def refuse(run: Run) -> None:
        raise UserError("out of reach")

    with Run.reopen(tmp_path) as run:
        for again in (False, True):
            with pytest.raises(UserError, match="out of reach"):
                run.change("search", {"search.generations": 50}, again=again, admit=refuse)
        run.change("search", {}, admit=refuse)  # nothing is asked for
        assert run.done("chosen.json")
    assert (tmp_path / "manifest.json").read_text() == before


def test_a_change_that_changes_nothing_keeps_everything(tmp_path: Path) -> None:
    finished_run(tmp_path)
    with Run.reopen(tmp_path) as run:
        run.change("search", {"search.generations": config()["search"]["generations"], "score.method": "obs"})
        assert run.done("chosen.json")
        run.change("search", {"device": "cuda"})
        assert run.done("chosen.json")
        run.change("search", {}, again=True)
        assert run.done("scores.json")
        assert not run.done("chosen.json")


def test_config_yaml_is_a_record_that_is_kept_true(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", config(), SOURCE).close()
    path = tmp_path / "run/config.yaml"
    text = path.read_text()
    assert CompressConfig.from_dict(read_yaml(path)).to_dict() == config()
    path.write_text(text.replace("seed: 0", "seed: 7"))
    Run.reopen(tmp_path / "run").close()
    assert path.read_text() == text
