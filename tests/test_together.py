"""Several processes on one run: the first one works, the others join for the training, and the outcome is one's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

import hurry
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from safetensors.torch import load_file

from prunus import launched, pipeline
from prunus.cli import app
from prunus.config import nest, resolve
from prunus.errors import UserError
from prunus.recording.reader import ReadOnlyRun
from prunus.recording.run import Run
from prunus.terminal import Terminal
from prunus.training import meeting
from prunus.training.states import refuse_sharded

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "stories260k-hf"
TEXT = SHARED / "tinystories" / "tinystories_part.txt"
needs_data = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the tiny trained model of the data beside the project"
)
SETTINGS = {
    "calibration.holdout": 8, "search.mlp_step": 8, "search.generations": 0, "train.length": 64, "train.steps": 6,
    "train.batch": 4, "train.lr": 1e-3, "train.precision": "float32", "train.holdout": 8, "train.bins": 4,
    "train.draws": 3, "train.save_every": 3, "train.log_every": 1,
}  # fmt: skip


def changes(accumulation: int) -> dict[str, Any]:
    return {
        "calibration.source": str(TEXT), "calibration.samples": 24, "calibration.length": 128, "keep": (0.6,),
        "train.data": str(TEXT), "train.accumulation": accumulation, **SETTINGS,
    }  # fmt: skip


@needs_data
def test_two_processes_make_the_run_that_one_makes_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Real processes, each of which imports torch: half a minute."""
    pipeline.compress(resolve(None, {"model": str(MODEL), **changes(2)}), tmp_path / "1")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(nest({**changes(1), "keep": [0.6]})))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", hurry.__file__]
    command += ["compress", str(MODEL), "--config", str(tmp_path / "settings.yaml"), "--out", str(tmp_path / "2")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report.md") == 1  # one of them speaks
    notes = [json.loads((tmp_path / n / "manifest.json").read_text())["notes"]["train"] for n in "12"]
    assert [note["processes"] for note in notes] == [1, 2]
    assert [note["tokens"] for note in notes] == 2 * [6 * 2 * 4 * 64]
    one, two = (load_file(tmp_path / n / "supernet" / "model.safetensors") for n in "12")
    dense = load_file(MODEL / "model.safetensors")
    assert all(torch.allclose(weight, two[name], atol=1e-5) for name, weight in one.items())
    name = "model.norm.weight"  # which sorting leaves as it is
    assert float((two[name] - dense[name]).abs().max()) > 1e-4


SHARDED = """
import sys
from accelerate.state import DistributedType, PartialState
from prunus.training import states

begin = PartialState.__init__
def pretend(self, *args, **more):  # accelerate shards on GPUs only; FSDP2 itself does it anywhere
    begin(self, *args, **more)
    self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = pretend

put = states.put
def seen(model, weights):
    print("put together again", flush=True)
    put(model, weights)
states.put = seen

from prunus.cli import app
app(sys.argv[1:], prog_name="prunus")
"""


@needs_data
def test_recover_on_sharded_weights_is_recover(tmp_path: Path) -> None:
    """FSDP2, two real processes on the CPU; the state in the middle is written and read in pieces too."""
    words = ["recover", str(MODEL), "--teacher", str(MODEL), "--train", str(TEXT), "--ce", "0.5", "--dtype", "float32"]
    drawn = ("train.bins", "train.draws")  # which one network has no use for
    own = {key: value for key, value in SETTINGS.items() if key.startswith("train.") and key not in drawn}
    for key, value in {**own, "train.checkpointing": True}.items():
        words += ["--set", f"{key}={value}"]
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }  # fmt: skip
    done = subprocess.run(
        [*launch, *words, "--out", str(tmp_path / "two")], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("put together again") == 1  # it was in pieces
    alone = [*words, "--set", "train.accumulation=2", "--out", str(tmp_path / "one")]
    assert CliRunner().invoke(app, alone).exit_code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(weight, two[name], atol=1e-5) for name, weight in one.items())


def test_sharding_that_cannot_serve_is_refused() -> None:
    refuse_sharded(Some(), slices=True)
    refuse_sharded(Some(fsdp_plugin=Some(fsdp_version=2)), slices=False)
    refuse_sharded(Some(deepspeed_plugin=Some(zero_stage=2)), slices=True)
    for refused, slices, words in (
        (Some(deepspeed_plugin=Some(zero_stage=3)), False, "zero_stage 1 or 2"),
        (Some(fsdp_plugin=Some(fsdp_version=1)), False, "fsdp_version: 2"),
        (Some(fsdp_plugin=Some(fsdp_version=2)), True, "views into whole weights"),
    ):
        with pytest.raises(UserError, match=words):
            refuse_sharded(refused, slices=slices)


def test_the_configurations_of_the_documentation_are_accelerates() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    known = {action.dest for action in launch_command_parser()._actions}
    found = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]
    plugins = []
    for one in found:
        ClusterConfig(**ClusterConfig.process_config(dict(one)))  # raises for a key that it does not have
        plugins.append(one.get("deepspeed_config") or one["fsdp_config"])
        assert plugins[-1].keys() <= known
    deepspeed, sharded = plugins
    refuse_sharded(Some(deepspeed_plugin=Some(**deepspeed)), slices=True)
    refuse_sharded(Some(fsdp_plugin=Some(**sharded)), slices=False)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where two processes would meet."""
    found = dist.HashStore()
    monkeypatch.setattr(meeting, "_store", lambda: found)
    monkeypatch.setattr(meeting, "PAUSE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    return found


def test_the_others_are_sent_home_where_nothing_is_left_to_train(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="refused"), meeting.leading():
        raise UserError("refused, before the training")
    assert launched.processes() == 1  # alone from here on
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert meeting.called() is False


def test_the_others_come_when_they_are_called(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with meeting.leading():
        meeting.call()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert meeting.called() is True
    del store
    monkeypatch.setattr(meeting, "_store", lambda: Gone())
    with pytest.raises(UserError, match="has ended before the training"):
        meeting.called()


class Gone:
    """The store of a process that is no more."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("connection reset")


def test_what_takes_one_process_is_refused_in_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started together"):
        pipeline.compress(resolve(None, {"model": str(MODEL), "keep": (0.5,)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.delenv("WORLD_SIZE")
    with Run.open(tmp_path / "run", resolve(None, {"model": str(MODEL)}).to_dict(), {"id": "m"}):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="only a training takes several"):
        pipeline.step(tmp_path / "run", "search", {})


def test_processes_that_cannot_meet_are_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launched.SAID:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    meeting._store.cache_clear()
    with pytest.raises(UserError, match="torchrun or accelerate launch"):
        meeting.called()


def test_each_process_has_a_device_of_its_own_and_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched.own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [launched.own_device(device) for device in ("cuda", "cpu", "cuda:0")] == ["cuda:1", "cpu", "cuda:0"]
    monkeypatch.setenv("RANK", "1")
    Terminal().result({"checkpoint": "x"}, "-")
    assert capsys.readouterr().out == ""
    launched.forget()
    Terminal().result({"checkpoint": "x"}, "-")
    assert json.loads(capsys.readouterr().out) == {"checkpoint": "x"}


def test_a_run_that_is_only_read_refuses_what_is_not_done(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {"model": "m"}, {"id": "m"}) as run:
        run.do("score", "a.json", lambda: {"x": [1]})
        reader = ReadOnlyRun(tmp_path / "run")  # beside the one that has the lock
        assert reader.do("score", "a.json", lambda: pytest.fail("computed")) == {"x": [1]}
        before = (tmp_path / "run" / "manifest.json").read_text()
        reader.note("x", 1)
        assert reader.grow("train", "training") == tmp_path / "run" / "training"
        with pytest.raises(UserError, match="a disk that all of them see"):
            reader.do("score", "b.json", lambda: pytest.fail("computed"))
        reader.close()
        assert (tmp_path / "run" / "manifest.json").read_text() == before
        run.note("still", "locked")
