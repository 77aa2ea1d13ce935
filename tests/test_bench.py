"""The bench on a really trained tiny model: rows, resuming, and the door."""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hurry import painted
from rich.console import Console

from prunus import cli, tasks
from prunus.baselines import bench, benchpages, magnitude
from prunus.baselines.bench import Plan, read_lengths, run, slug
from prunus.baselines.table import OURS, TABLE, chosen, listed
from prunus.config import CompressConfig, resolve
from prunus.errors import UserError
from prunus.recording import tables
from prunus.terminal import rendered
from prunus.texts import calibration

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "stories260k-hf"
STORIES = SHARED / "tinystories" / "tinystories_part.txt"
needs_model = pytest.mark.skipif(
    not MODEL.is_dir(), reason="needs the tiny trained model of the data beside the project"
)
QUICK = {
    "calibration.samples": 8,
    "calibration.length": 64,
    "calibration.holdout": 4,
    "search.mlp_step": 16,
    "search.offspring": 2,
    "rival.search_tokens": 640,
}


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """Calibration text and another one to be scored on."""
    whole = STORIES.read_text(encoding="utf-8")
    paths = tmp_path / "calibration.txt", tmp_path / "stories.txt"
    paths[0].write_text(whole[:60_000], encoding="utf-8")
    paths[1].write_text(whole[-30_000:], encoding="utf-8")
    return str(paths[0]), str(paths[1])


def config(source: str, **changes: Any) -> CompressConfig:
    given = {"model": str(MODEL), "calibration.source": source, **QUICK}
    return resolve(None, {**given, **{key.replace("__", "."): value for key, value in changes.items()}})


def plan(files: tuple[str, str], *methods: str, **changes: Any) -> Plan:
    given: dict[str, Any] = dict(
        methods=methods,
        keeps=(0.8, 0.5),
        calibrations=(files[0],),
        texts=(files[1],),
        lengths=((64, 4), (32, 2)),
        speed=False,
    )
    return Plan(**{**given, **changes})


# ---------------------------------------------------------------------------------------------------------------- rows


@needs_model
def test_a_finished_row_is_not_computed_again(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    own = magnitude.compress

    def counted(subject: Any, keep: float) -> Any:
        made.append(keep)
        if keep == 0.5 and len(made) == 2:
            raise KeyboardInterrupt
        return own(subject, keep)

    monkeypatch.setattr(magnitude, "compress", counted)
    asked = plan(texts, "magnitude")
    with pytest.raises(KeyboardInterrupt):
        run(config(texts[0]), asked, tmp_path / "out")
    first = json.loads((tmp_path / "out" / "rows" / "calibration.txt" / "magnitude-0.8.json").read_text())
    found = run(config(texts[0]), asked, tmp_path / "out")
    assert made == [0.8, 0.5, 0.5]
    again = run(config(texts[0]), asked, tmp_path / "out")
    assert len(made) == 3
    assert again["rows"] == found["rows"]
    told = found["rows"][1]
    assert told | first == told
    assert told["weights_mb"] == first["n_bytes"] / 1e6
    more = run(config(texts[0]), plan(texts, "shortgpt", keeps=(0.8,)), tmp_path / "out")
    assert len(made) == 3
    assert [(r["method"], r["kept"]) for r in more["rows"]] == [
        ("dense", 1.0), ("magnitude", 0.8), ("magnitude", 0.5), ("shortgpt", 0.8),
    ]  # fmt: skip
    assert "--methods magnitude shortgpt --keep 0.8 0.5" in more["command"]


@needs_model
def test_the_calibration_by_default_is_what_can_be_had(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "auto_source", lambda: texts[0])
    found = run(config(texts[0]), plan(texts, "magnitude", keeps=(0.8,), calibrations=("auto",)), tmp_path / "out")
    assert [row.get("calibration") for row in found["rows"]] == [None, Path(texts[0]).name]
    assert f"--calibration {Path(texts[0]).name}" in found["command"]


@needs_model
def test_a_calibration_text_that_is_refused_leaves_no_bench(texts: tuple[str, str], tmp_path: Path) -> None:
    asked = plan(texts, "magnitude", calibrations=(texts[0], str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="cannot read the text file"):
        run(config(texts[0]), asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_model
def test_rows_say_what_they_cost_and_how_to_make_them(texts: tuple[str, str], tmp_path: Path) -> None:
    asked = plan(texts, "flap", "mask-magnitude", "mask-wanda-2:4", speed=True, keeps=(0.8,))
    with painted():
        found = run(config(texts[0]), asked, tmp_path / "out")
    dense, flap, mask, refused = found["rows"]
    assert mask["ppl64"] > dense["ppl64"] and "speed" not in mask  # its shapes are the dense model's
    assert dense["ppl64"] == dense["perplexity"]["stories.txt"]["64"]["ppl"]
    assert "--methods flap --keep 0.8 --calibration calibration.txt" in dense["command"]  # the shortest that makes it
    assert "--methods mask-wanda-2:4 --keep 0.8" in refused["command"]
    assert dense["n_bytes"] == 4 * dense["parameters"] > flap["n_bytes"]
    assert dense["weights_mb"] == dense["n_bytes"] / 1e6
    assert dense["decoded"] == flap["speed"]["dense"]["decode"]
    assert flap["ppl64"] > dense["ppl64"]
    assert 0.79 < flap["kept_blocks"] <= 0.8 < flap["kept_all"] < 1
    assert flap["forward_tokens"] == 8 * 64
    assert flap["seconds"] > 0
    assert dense["weights_mb"] < flap["peak_mb"] < 250  # without Python and its libraries
    assert flap["prefill_speedup"] > 0 and flap["speed"]["small"]["decode"] > 0
    assert "--methods flap --keep 0.8 --calibration calibration.txt --text stories.txt" in flap["command"]
    assert "--samples 8 --length 64 --seed 0" in flap["command"]
    changed = {
        f"{key}={value}" for key, value in QUICK.items() if key not in ("calibration.samples", "calibration.length")
    }
    words = shlex.split(flap["command"])
    assert {words[k + 1] for k, word in enumerate(words) if word == "--set"} == changed
    read = dict(pair.split("=") for pair in changed)
    assert resolve(None, {"model": str(MODEL), **read}).rival.search_tokens == QUICK["rival.search_tokens"]
    assert str(tmp_path) not in json.dumps(found["rows"])
    assert "keeps 0.5 of every matrix" in refused["refused"]
    for key in ("machine", "versions", "threads", "device"):
        assert flap[key] == found[key]
    page = (tmp_path / "out" / "bench.md").read_text()
    minutes = sum(row["row_seconds"] for row in (dense, flap, mask)) / 60
    assert flap["row_seconds"] > flap["seconds"] and f"3 rows in {minutes:.1f} minutes" in page
    assert f"| flap | **{flap['ppl64']:.2f}** |" in page
    assert "refused, because" in page
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "bench-speed.svg").is_file()
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == found["rows"]


@needs_model
def test_a_network_that_cannot_be_measured_is_a_row_and_the_others_go_on(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, seen = bench._Bench.measured, list[Any]()

    def fails(self: Any, model: Any, *structured: bool) -> dict[str, Any]:
        seen.append(model)
        if len(seen) == 2:  # the dense model is first
            raise UserError("the model gives NaN")
        return measure(self, model, *structured)

    monkeypatch.setattr(bench._Bench, "measured", fails)
    found = run(config(texts[0]), plan(texts, "magnitude", "shortgpt", keeps=(0.8,)), tmp_path / "out")
    _, first, second = found["rows"]
    assert not first["done"] and first["refused"] == "the network cannot be measured: the model gives NaN"
    assert second["done"]


@needs_model
def test_ours_is_a_run_beside_the_rows_and_beats_plain_slicing(texts: tuple[str, str], tmp_path: Path) -> None:
    found = run(config(texts[0]), plan(texts, OURS, "magnitude", keeps=(0.6,)), tmp_path / "out")
    rows = {r["method"]: r for r in found["rows"]}
    assert (tmp_path / "out" / "prunus" / "calibration.txt" / "report.md").is_file()
    assert rows[OURS]["ppl64"] < rows["magnitude"]["ppl64"]
    assert rows[OURS]["forward_tokens"] > 8 * 64
    assert 0.59 < rows[OURS]["kept_blocks"] <= 0.6


@needs_model
def test_two_calibrations_and_two_texts(texts: tuple[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(texts[1]).read_text()[:15_000])
    second = tmp_path / "second.txt"
    second.write_text(Path(texts[0]).read_text()[::-1])
    both = {"calibrations": (texts[0], str(second)), "texts": (texts[1], str(other))}
    asked = plan(texts, "wanda-sp-dense", keeps=(0.6,), **both)
    found = run(config(texts[0]), asked, tmp_path / "out")
    rows = found["rows"][1:]
    assert [r["calibration"] for r in rows] == ["calibration.txt", "second.txt"]
    assert rows[0]["ppl64"] != rows[1]["ppl64"]  # text backwards is no help
    assert set(rows[0]["perplexity"]) == {"stories.txt", "other.txt"}
    assert rows[0]["ppl64_other"] == rows[0]["perplexity"]["other.txt"]["64"]["ppl"]
    assert {"ppl64-calibration.txt", "ppl64_other-second.txt", "cost"} <= set(found["views"])
    later = run(config(texts[0]), replace(asked, calibrations=(str(second),)), tmp_path / "out")
    assert later["rows"] == found["rows"]  # those of earlier calls too, and the command makes them all
    assert later["command"] == found["command"]
    assert "--calibration calibration.txt --calibration second.txt" in found["command"]


def test_what_a_bench_cannot_be_asked(texts: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'flap'"):
        plan(texts, "flop")
    with pytest.raises(UserError, match="no text file"):
        plan(texts, "flap", texts=("nowhere.txt",))
    with pytest.raises(UserError, match="test text and calibration text at once"):
        plan(texts, "flap", calibrations=(texts[1],))
    with pytest.raises(UserError, match="test text and calibration text at once"):
        plan(texts, "flap", calibrations=(str(Path(texts[1]).parent / "." / ".." / tmp_path.name / "stories.txt"),))
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "stories.txt"
    twin.write_text("Once.")
    with pytest.raises(UserError, match=r"give stories\.txt another name"):
        plan(texts, "flap", texts=(texts[1], str(twin)))
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(texts[1]).read_bytes())
    for sources in ((str(copy),), (texts[0], f"{texts[0]}:0.7,{copy}:0.3")):
        with pytest.raises(UserError, match=r"stories\.txt' has the same bytes as the calibration text '.*copy\.txt'"):
            plan(texts, "flap", calibrations=sources)
    copy.write_bytes(b"x" + copy.read_bytes()[1:])  # as long, and another text
    plan(texts, "flap", calibrations=(str(copy), "generated"))
    with pytest.raises(UserError, match="at least one"):
        plan(texts, "flap", texts=())


@needs_model
def test_a_full_disk_stops_the_bench_and_the_same_command_asks_again(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def full(config: CompressConfig, *_: Any) -> Any:
        asked.extend(config.keep)
        raise UserError("the disk is full")

    monkeypatch.setattr(bench.pipeline, "compress", full)
    for _ in range(2):
        with pytest.raises(UserError, match="the disk is full"):
            run(config(texts[0]), plan(texts, OURS, keeps=(0.8,)), tmp_path / "out")
    assert asked == [0.8, 0.8]


@needs_model
def test_another_protocol_needs_another_directory(texts: tuple[str, str], tmp_path: Path) -> None:
    run(config(texts[0]), plan(texts, "magnitude", keeps=(0.8,)), tmp_path / "out")
    with pytest.raises(UserError, match=r"bench\.lengths"):
        run(config(texts[0]), plan(texts, "magnitude", lengths=((128, 2),)), tmp_path / "out")
    with pytest.raises(UserError, match=r"calibration\.samples"):
        run(config(texts[0], calibration__samples=9), plan(texts, "magnitude"), tmp_path / "out")


def test_words() -> None:
    assert read_lengths(("2048:5", "128")) == ((2048, 5), (128, 80))
    for bad in ("x", "0:3", "128:0", "1", "2.5"):
        with pytest.raises(UserError, match="TOKENS:WINDOWS"):
            read_lengths((bad,))
    assert chosen(("flap", "all"))[:2] == ("flap", OURS)
    assert set(chosen(("all",))) == {OURS, *TABLE}
    assert not any(name.startswith("mask") for name in chosen(("structured",)))
    assert slug("mask-wanda-2:4") == "mask-wanda-2-4"


def test_tables_do_not_let_masks_compete() -> None:
    rows: list[dict[str, Any]] = [{"method": "dense", "kept": 1.0, "ppl64": 4.0}]
    rows += [
        {"method": m, "kept": 0.5, "ppl64": p, "calibration": "c", "done": True, "structured": s}
        for m, p, s in (("flap", 9.0, True), ("mask-wanda", 5.0, False))
    ]
    found = benchpages.views(rows)
    assert found["ppl64-c"]["where"] == {"calibration": "c", "done": True, "structured": True}
    assert found["ppl64-c-masks"]["where"]["structured"] is False
    assert "neither smaller nor faster" in found["ppl64-c-masks"]["note"]


def test_two_texts_and_two_calibrations_are_four_panels() -> None:
    dense: dict[str, Any] = {"method": "dense", "kept": 1.0, "ppl64": 4.0, "ppl64_b": 5.0, "ppl8": 9.0}
    dense["perplexity"] = {"a.txt": {}, "b.txt": {}}
    rows = [dense] + [
        {"method": m, "kept_blocks": k, "ppl64": 8.0, "ppl64_b": 999.0, "calibration": c, "done": True,
         "structured": True}
        for m in ("prunus", "flap") for k in (0.5, 0.8) for c in ("c", "d")
    ]  # fmt: skip
    axes = benchpages.picture(rows).axes
    assert [a.get_title("left") for a in axes] == ["calibrated on c", "calibrated on d"] * 2
    assert [a.get_ylabel() for a in axes[::2]] == [f"perplexity, windows of 64 tokens of {n}" for n in ("a.txt", "b")]
    drawn = [{line.get_label(): line for line in a.lines} for a in axes]
    assert list(drawn[0]) == ["dense", "prunus", "flap"]
    assert list(drawn[2]) == ["dense"]  # the others are more than thirty times worse
    assert list(drawn[0]["flap"].get_xdata()) == [50.0, 80.0]
    assert benchpages.views(rows)["ppl64_b-d"]["note"].startswith(
        "Perplexity, windows of 64 tokens of b; calibrated on d"
    )


def test_quality_stands_against_measured_speed() -> None:
    dense: dict[str, Any] = {"method": "dense", "kept": 1.0, "ppl64": 4.0, "perplexity": {"a.txt": {}}}
    rows: list[dict[str, Any]] = [
        {"method": m, "calibration": "c", "kept_blocks": k, "ppl64": p, "prefill_speedup": 1 / k, "decode_speedup": 1.1,
         "weights_mb": 9 * k}
        for m, k, p in (("prunus", 0.5, 8.0), ("prunus", 0.8, 5.0), ("flap", 0.8, 9.0), ("flap", 0.5, 999.0))
    ]  # fmt: skip
    quality, decoding, size = benchpages.speeds(dense, rows).axes
    drawn = {line.get_label(): line for line in quality.lines}
    assert list(drawn["prunus"].get_xdata()) == [1.25, 2.0]
    assert list(drawn["flap"].get_ydata()) == [9.0]  # the other is more than thirty times worse
    assert list(decoding.lines[1].get_ydata()) == [1.1, 1.1]  # but as fast as it is
    assert list(size.lines[0].get_xdata()) == [50.0, 80.0]
    both = [*rows, *({**row, "calibration": "d"} for row in rows)]
    lines = benchpages.speeds(dense, both).axes[1].lines
    assert [line.get_label() for line in lines] == ["prunus, c", "flap, c", "prunus, d", "flap, d"]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--"]
    scored = [{**row, "task_mean": 0.4, "task_mean_se": 0.02} for row in rows]
    axes = benchpages.speeds({**dense, "task_mean": 0.5}, scored).axes
    assert [a.get_ylabel() for a in axes[:2]] == ["mean score of the tasks"] * 2
    bar = axes[1].containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([0.38, 0.42])


def test_tables_of_several_calibrations_and_of_tasks() -> None:
    score = {"score": 0.5, "metric": "acc", "se": 0.03, "n": 200}
    dense: dict[str, Any] = {"method": "dense", "kept": 1.0, "ppl64": 4.0, "task_mean": 0.6, "tasks": {"piqa": score}}
    rows = [dense] + [
        {"method": "flap", "calibration": c, "kept": 0.5, "done": True, "structured": True, "ppl64": p,
         "task_mean": 0.5, "task_mean_se": 0.03, "tasks": {"piqa": score}}
        for c, p in (("c", 8.0), ("d", 9.0))
    ]  # fmt: skip
    refused = {"method": "laco", "calibration": "c", "kept": 0.5, "done": False, "refused": "no"}
    rows = [bench._told(row) for row in (*rows, refused)]
    data = {"rows": rows, "views": benchpages.views(rows), "versions": {}, "command": "x", "machine": "m"}
    assert next(iter(data["views"])) == "ppl64"
    assert "| flap, c | **8.00** |\n| flap, d | **9.00** |" in tables.view(data, "", "f.json")
    assert "| flap | **0.500** ± 0.030 |" in tables.view(data, "tasks-d", "f.json")
    each = tables.view(data, "tasks", "f.json")
    assert "| flap | d | 50% | 0.500 ± 0.030 | 0.500 ± 0.030 |" in each
    assert "first 200 questions at most" in each and "laco" not in each


@needs_model
def test_rows_are_compared_with_the_dense_model_question_by_question(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    one = {"metric": "acc", "se": 0.2, "n": 4}
    monkeypatch.setattr(
        bench, "task_scores", lambda *a, **k: {"piqa": {**one, "score": sum(e := next(answers)) / 4, "each": e}}
    )
    asked = plan(texts, "magnitude", keeps=(0.8,), tasks=("piqa",))
    for _ in range(2):  # the second time from the rows' files
        dense, row = run(config(texts[0]), asked, tmp_path / "out")["rows"]
        assert "task_gain" not in dense and row["task_gain"] == -0.5
        assert row["task_gain_se"] == pytest.approx(math.sqrt(1 / 3 / 4))
        assert row["tasks"] == {"piqa": {**one, "score": 0.25}}  # those of every question only in the row's file
    page = (tmp_path / "out" / "bench.md").read_text()
    assert "| against the dense |" in page and "| -0.500 ± 0.289 |" in page


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="knows no task 'no_such'"):
        tasks.task_scores(torch.nn.Identity(), None, ["no_such"], path=str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ the door


def prunus_(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args), prog_name="prunus")


def test_the_list_needs_no_model() -> None:
    done = prunus_("bench", "--list")
    assert done.exit_code == 0, done.output
    for name in (OURS, *TABLE):
        assert f"\n{name} " in done.output
    for width in (80, 120):
        page = shown(listed(), width)
        assert max(map(len, page)) <= width
        assert sum(len(line.split()) == 1 for line in page) <= 6  # hardly a line for a single word
        papers = {word.strip(",") for one in TABLE.values() for word in one.paper.split() if ":" in word}
        assert papers <= {word.strip(",;") for line in page for word in line.split()}  # none is cut in two


def shown(found: dict[str, Any], width: int) -> list[str]:
    """What a terminal of so many columns shows of a result."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    for part in rendered(found):
        console.print(part)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_words_after_a_flag_reach_the_bench(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fake(config: CompressConfig, plan: Plan, out: str, progress: Callable[..., Any]) -> dict[str, Any]:
        seen.append((config, plan, out))
        return {"rows": [{"method": "dense", "kept": 1.0, "ppl64": 4.0}], "report": "bench.md"}

    monkeypatch.setattr(bench, "run", fake)
    done = prunus_(
        "bench", "demo", "--methods", "flap", "slicegpt", "--keep", ".9", "0.5", "--text", texts[1],
        "--calibration", texts[0], "--calibration", "generated",
        "--lengths", "64:4", "32", "--samples", "5", "--out", str(tmp_path / "o"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    asked, what, out = seen[0]
    assert (asked.model, asked.calibration.samples, out) == ("demo", 5, str(tmp_path / "o"))
    assert what.methods == ("flap", "slicegpt")
    assert what.keeps == (0.9, 0.5)
    assert what.calibrations == (texts[0], "generated")
    assert what.lengths == ((64, 4), (32, 320))
    refused = prunus_("bench", "demo", "--methods", "flop", "--text", texts[1], "--out", "o")
    assert refused.exit_code == 2
    assert "did you mean 'flap'" in refused.output
    assert prunus_("bench", "demo", "--text", texts[1]).exit_code == 2
    done = prunus_("bench", "demo", "--text", texts[1], "--out", "o", "--json", "-")
    assert json.loads(done.stdout)["report"] == "bench.md"  # and nothing else


def test_settings_serve_where_a_bench_has_no_flag(
    texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    row = {"method": "dense", "kept": 1.0, "ppl64": 4.0}
    monkeypatch.setattr(bench, "run", lambda _, plan, *__: plans.append(plan) or {"rows": [row], "report": "bench.md"})
    (tmp_path / "c.yaml").write_text(f"model: demo\nkeep: [0.7, 0.6]\ntest_text: {texts[1]}\nmethod: flap\n")
    flags = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o")]
    for more in (["--set", "test_length=64"], ["--text", texts[0], "--methods", "shortgpt", "--keep", "0.5"]):
        done = prunus_("bench", *flags, "--calibration", "generated", *more)
        assert done.exit_code == 0, done.output
    first, second = plans
    assert (first.methods, first.keeps, first.texts, first.lengths) == (("flap",), (0.7, 0.6), (texts[1],), ((64, 5),))
    assert (second.methods, second.keeps, second.texts) == (("shortgpt",), (0.5,), (texts[0],))
    missing = prunus_("bench", "demo", "--out", str(tmp_path / "o"))
    assert missing.exit_code == 2 and "at least one text; give --text" in missing.stderr
