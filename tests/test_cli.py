"""The door: what is typed reaches the verbs, what goes wrong is one sentence, and help costs no torch."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

import prunus
from prunus import cli, config
from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.flags import Flag
from prunus.progress import LineProgress, silent
from prunus.recording import changes
from prunus.setting import ANYWHERE
from prunus.terminal import networks

NETWORK = {"kept_blocks": 0.8, "kept_all": 0.84, "parameters": 113_000_000, "n_bytes": 226_000_000}
RESULT = {
    "dense": {**NETWORK, "name": "dense", "kept_blocks": 1.0, "perplexity": {"wiki, 5 chunks": 23.69}},
    "chosen": [{**NETWORK, "name": "keep-0.8", "kl_nats": 0.25, "kl_se": 0.01, "perplexity": {"wiki, 5 chunks": 29.0}}],
    "report": "run/report.md",
    "not_finite": float("inf"),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the pipeline; collects what it is called with."""
    seen: list[Any] = []

    def compress(config: CompressConfig, out: Path, progress: Any) -> dict[str, Any]:
        seen.append((config, out, progress))
        return RESULT

    def step(out: Path, name: str, asked: dict[str, Any], progress: Any, again: bool) -> dict[str, Any]:
        seen.append((out, name, {**asked, "again": True} if again else asked))
        return {"run": str(out)}

    fake = types.SimpleNamespace(compress=compress, step=step)
    monkeypatch.setitem(sys.modules, "prunus.pipeline", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(prunus, "pipeline", fake, raising=False)
    monkeypatch.setattr(cli, "calm_libraries", lambda: None)
    return seen


def prunus_(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="prunus")


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# -------------------------------------------------------------------------------------------------------------- asking


@pytest.mark.parametrize(
    "keep",
    [
        ["--keep", "0.9", "0.8", "0.5"],
        ["--keep", "0.9,0.8,0.5"],
        ["--keep", "0.9,0.8", "0.5"],
        ["--keep=0.9", "0.8", "--keep", "0.5"],
        ["--keep", "0.5", ".8", "9e-1"],
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_keep_takes_several_values(calls: list[Any], keep: list[str], first: bool) -> None:
    done = prunus_("compress", *(keep if first else []), "demo", "--out", "r", *([] if first else keep))
    assert done.exit_code == 0, done.output
    assert calls[0][0].keep == (0.9, 0.8, 0.5)
    assert calls[0][0].model == "demo"


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--speedup", "1.3", "2"], ["speedup-1.3", "speedup-2"]),
        (["--latency-ms=40", "30.5"], ["latency-40ms", "latency-30.5ms"]),
        (["--tokens-per-second", "20,30"], ["rate-20tps", "rate-30tps"]),
        (["--memory-mb", "180", "--context", "4096", "--batch", "1"], ["memory-180mb"]),
    ],
)
def test_budgets_take_the_place_of_keep(calls: list[Any], args: list[str], names: list[str]) -> None:
    done = prunus_("compress", "demo", "--out", "r", *args)
    assert done.exit_code == 0, done.output
    config = calls[0][0]
    assert [target.name for target in config.targets] == names
    assert config.keep == ()


def test_a_table_is_shown_with_a_row_for_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def inspect(config: CompressConfig, **given: Any) -> dict[str, Any]:
        asked.append((config.budget, given["step"], given["again"], given["picture"]))
        return {"model": config.model, "dense_token_ms": 21.5, "widths": [{"part": "MLP 64", "token_ms": 0.25}]}

    fake = types.SimpleNamespace(inspect_latency=inspect)
    monkeypatch.setitem(sys.modules, "prunus.inspection", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(cli, "calm_libraries", lambda: None)
    done = prunus_("latency", "demo", "--prompt", "128", "--batch", "1", "--generate", "0", "--step", "64", "--again")
    assert done.exit_code == 0, done.output
    for piece in ("dense token ms", "21.5", "MLP 64", "0.25"):
        assert piece in done.stdout, piece
    budget, *rest = asked[0]
    assert (budget.prompt, budget.batch, budget.generate) == (128, 1, 0)
    assert rest == [64, True, None]


def test_keep_without_a_value_is_an_error(calls: list[Any]) -> None:
    for args in (["compress", "demo", "--out", "r", "--keep"], ["compress", "--keep", "demo", "--out", "r"]):
        done = prunus_(*args)
        assert done.exit_code == 2
        assert not calls


def test_flags_reach_their_settings(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\nsearch: {offspring: 9, generations: 4}\n")
    done = prunus_(
        "compress", "some/model", "--out", tmp_path / "run", "--config", tmp_path / "c.yaml", "--keep-of", "all",
        "--uniform", "--calibration", "generated", "--samples", "8", "--score", "wanda", "--generations", "6",
        "--device", "cpu", "--dtype", "float32", "--test-text", "t.txt", "--set", "search.mlp_step=64",
        "--set", "reform.order=score",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    config, out, _ = calls[0]
    assert out == tmp_path / "run"
    assert (config.model, config.keep_of, config.uniform, config.seed) == ("some/model", "all", True, 1)
    assert (config.calibration.source, config.calibration.samples) == ("generated", 8)
    assert (config.score.method, config.search.generations, config.search.offspring) == ("wanda", 6, 9)
    assert (config.device, config.dtype, config.test_text, config.search.mlp_step) == ("cpu", "float32", "t.txt", 64)


def test_the_model_may_come_from_the_file(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: from/file\n")
    assert prunus_("compress", "--out", "r", "--config", tmp_path / "c.yaml").exit_code == 0
    assert calls[0][0].model == "from/file"
    assert prunus_("compress", "--out", "r").exit_code == 2
    assert prunus_("compress", "--out", "r", "--set", "model=from/set").exit_code == 0
    assert calls[1][0].model == "from/set"


def test_switches_can_be_turned_off_over_the_file(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("uniform: true\n")
    prunus_("compress", "demo", "--out", "r", "--config", tmp_path / "c.yaml")
    prunus_("compress", "demo", "--out", "r", "--config", tmp_path / "c.yaml", "--no-uniform")
    assert [config.uniform for config, _, _ in calls] == [True, False]


def test_steps_pass_only_what_was_asked_for(calls: list[Any]) -> None:
    done = prunus_("search", "runs/a", "--generations", "50", "--set", "search.depth=no", "--set", "seed=0")
    assert done.exit_code == 0, done.output
    assert calls == [(Path("runs/a"), "search", {"seed": 0, "search.generations": 50, "search.depth": False})]
    for name in ("score", "reform", "extract", "report"):
        assert prunus_(name, "runs/a").exit_code == 0
    assert [(name, asked) for _, name, asked in calls[1:]] == [
        (n, {}) for n in ("score", "reform", "extract", "report")
    ]


def test_again_reaches_the_step(calls: list[Any]) -> None:
    assert prunus_("search", "runs/a", "--again").exit_code == 0
    assert calls == [(Path("runs/a"), "search", {"again": True})]


# ------------------------------------------------------------------------------------------------------------ answering


def test_the_result_is_shown_and_written(calls: list[Any], tmp_path: Path) -> None:
    done = prunus_("compress", "demo", "--out", "r", "--json", tmp_path / "deep" / "result.json")
    assert done.exit_code == 0, done.output
    for piece in ("keep-0.8", "80.0 %", "113.0 M", "226.0 MB", "0.25 ± 0.01", "23.69", "29", "run/report.md"):
        assert piece in done.stdout, piece
    assert json.loads((tmp_path / "deep/result.json").read_text()) == {**RESULT, "not_finite": None}


def test_quiet_and_json_on_stdout(calls: list[Any], tmp_path: Path) -> None:
    done = prunus_("compress", "demo", "--out", "r", "--quiet", "--json", tmp_path / "r.json")
    assert done.output == ""
    assert calls[0][2] is silent
    assert json.loads((tmp_path / "r.json").read_text())["report"] == "run/report.md"
    done = prunus_("compress", "demo", "--out", "r", "--json", "-")
    assert json.loads(done.stdout)["chosen"][0]["name"] == "keep-0.8"
    assert isinstance(calls[1][2], LineProgress)  # no bars where there is no terminal


@pytest.mark.parametrize(
    ("place", "words"),
    [("", "a directory stands where a file is needed"), ("file/r.json", "a file stands where a directory is needed")],
)
def test_a_place_that_cannot_take_the_result_is_refused_before_the_work(
    place: str, words: str, calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for verb in (["compress", "demo", "--out", "r"], ["score", "r"], ["version"]):
        done = prunus_(*verb, "--json", tmp_path / place)
        assert done.exit_code == 2 and words in done.stderr and done.stdout == ""
    assert not calls


def test_progress_outside_a_terminal_is_a_line_for_each_piece(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress()
    with progress("search", 2) as outer:
        for _ in range(2):
            with progress("generation") as advance, progress("candidate"):
                advance(7)
            outer(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" in ")[0] for line in lines] == ["  generation: 7", "  generation: 7", "search: 2"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
def test_a_table_of_networks_cuts_nothing_off_in_any_width(width: int) -> None:
    """Networks become columns, in as many tables as it takes, where their figures have no room beside each other."""
    text = "wiki.test.raw, 5 chunks of 2048 tokens"
    found = [
        {**NETWORK, "name": f"keep-0.{k}", "kl_nats": 0.1 * k, "kl_se": 0.01, "perplexity": {text: 20.0 + k}}
        for k in range(9, 2, -1)
    ]
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(networks(found))
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, page.splitlines())) <= width
    assert "…" not in page
    words = page.split()
    for one in found:
        assert words.count(one["name"]) == 1
        assert f"{one['kl_nats']:.4g} ± 0.01" in page and f"{one['perplexity'][text]:.4g}" in words
    assert (page.count("kept of blocks") == 1) is (width >= 120)


# --------------------------------------------------------------------------------------------------------- going wrong


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["compress", "demo", "--out", "r", "--keep", "1.5"], "keep lies in (0, 1]; given 1.5"),
        (["compress", "demo", "--out", "r", "--score", "magic"], "score.method is one of obs"),
        (["compress", "demo", "--out", "r", "--set", "serch.depth=1"], "did you mean 'search.depth'?"),
        (["compress", "demo", "--out", "r", "--set", "depth"], "--set takes KEY=VALUE"),
        (["compress", "demo", "--out", "r", "--config", "absent.yaml"], "no configuration file 'absent.yaml'"),
        (["compress", "--out", "r"], "no model was named"),
        (["evaluate", "demo"], "give --text FILE"),
        (["latency", "demo", "--runtime", "vllm"], "budget.runtime is one of torch, torch.compile, llama.cpp"),
        (["compress", "demo", "--out", "r", "--speedup", "2", "--keep", "0.7"], "a run has one kind of target"),
        (["evaluate", "demo", "--tasks", "x", "--against", "y"], "--against compares on a text, and none was given"),
        (["evaluate", "demo", "--tasks", "x", "--speed"], "--speed compares on a text, and none was given"),
        (["evaluate", "demo", "--text", "absent.txt"], "no text file 'absent.txt'"),
        (["search", "absent", "--generations", "-1"], "search.generations lies in [0, inf)"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_two(calls: list[Any], args: list[str], sentence: str) -> None:
    done = prunus_(*args)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not calls


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("the rule; what to do"), "the rule; what to do"),
        (OSError(errno.ENOSPC, "No space left on device", "x.safetensors"), "x.safetensors: the disk is full"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            "not enough memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), "not enough memory"),
    ],
)
def test_what_the_user_can_mend_has_no_traceback(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    monkeypatch.setattr(sys.modules["prunus.pipeline"], "compress", failing(error))
    done = prunus_("compress", "demo", "--out", "r")
    assert done.exit_code == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("a bug"), OSError("strange"), KeyError("x")]
)
def test_a_bug_keeps_its_traceback(calls: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(sys.modules["prunus.pipeline"], "compress", failing(error))
    done = prunus_("compress", "demo", "--out", "r")
    assert done.exception is error


def test_an_interruption_says_how_to_go_on(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["prunus.pipeline"], "compress", failing(KeyboardInterrupt()))
    done = prunus_("compress", "demo", "--out", "my runs/a", "--keep", "0.9", "0.8")
    assert done.exit_code == 130
    assert "prunus compress demo --out 'my runs/a' --keep 0.9 0.8" in done.stderr


@pytest.mark.parametrize("verb", [["frobnicate"], ["compress", "demo"], ["compress", "demo", "--out", "r", "--frob"]])
def test_wrong_usage_is_code_two(verb: list[str]) -> None:
    assert prunus_(*verb).exit_code == 2


# ------------------------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("args", [["--help"], ["compress", "--help"], ["search", "-h"], ["version"]])
def test_help_costs_no_torch(args: list[str]) -> None:
    code = (
        "import sys; from prunus.cli import app\n"
        f"app({args!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'optuna', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_the_common_flags_and_a_sentence() -> None:
    for name, command in cli.app.commands.items():
        done = prunus_(name, "--help")
        assert done.exit_code == 0
        assert command.get_short_help_str(), name
        known = {flag for option in command.params for flag in option.opts}
        assert "--json" in known
        assert name == "version" or {"--quiet", "--device"} <= known, name
        assert name in ("version", "pick") or {"--config", "--set"} <= known, name
        assert ("--dtype" in known) is (name not in STEPS), name
        assert ("--seed" in known) is (name in ("compress", "evaluate", "recover", "bench")), name


STEPS = ("score", "train", "reform", "search", "extract", "report", "pick", "version")


def test_no_flag_of_a_step_is_one_that_the_run_would_refuse() -> None:
    """A step may change what it or a later step reads first; an earlier step's settings are the run's for good."""
    for name in STEPS[:-2]:
        first = config.STEPS.index(changes.FIRST.get(name, name))
        for option in cli.app.commands[name].params:
            if isinstance(option, Flag):
                step = config.settings()[option.key].step
                assert step == ANYWHERE or config.STEPS.index(step) >= first, (name, option.key)
                assert "[default" not in (option.help or ""), (name, option.key)  # the run's value counts


def test_python_dash_m_is_the_same_door() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-m", "prunus", "version"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0
    assert "transformers" in done.stdout


# ------------------------------------------------------------------------------------------------- with a real model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer of bytes, on disk."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<eos>", *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(path)
    return path


def test_evaluate(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All that glitters is not gold; often have you heard that told. " * 20)
    flags = ["--text", tmp_path / "text.txt", "--length", "64", "--chunks", "3", "--json", tmp_path / "result.json"]
    done = prunus_("evaluate", checkpoint, *flags, "--against", checkpoint)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert result["n_tokens"] == 3 * 63
    assert "text.txt, 3 x 64 tokens" in done.stdout
    assert "evaluation: 3" in done.stderr


def test_check(checkpoint: Path, tmp_path: Path) -> None:
    done = prunus_("check", checkpoint, "--json", tmp_path / "check.json")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "check.json").read_text())
    assert sum(part["parameters"] for part in result["parts"]) == result["parameters"]
    assert result["family"].startswith("llama")
    needs = {one["step"]: one["beside_the_weights_bytes"] for one in result["steps"]}
    assert list(needs) == ["score", "reform", "search", "extract", "evaluate"]
    assert result["memory_needed_bytes"] == result["weights_bytes"] + max(needs.values())
    assert "the table covers every parameter" in done.stdout
    assert "beside the weights" in done.stdout


def test_check_of_nothing(tmp_path: Path) -> None:
    done = prunus_("check", tmp_path / "absent")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")


def test_the_help_keeps_to_eighty_columns_and_cuts_nothing_off() -> None:
    for args in [["--help"], *([name, "--help"] for name in cli.app.commands)]:
        page = CliRunner().invoke(cli.app, args, terminal_width=80).output
        assert max(map(len, page.splitlines())) <= 80, args
        assert "..." not in page.partition("Commands:")[2], args
