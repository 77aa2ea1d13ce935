"""The pages and pictures of a bench: each method looks the same everywhere, and what was made otherwise is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from prunus.baselines import benchpages
from prunus.baselines.benchpages import LOOKS, coincident, dense_speed, spread
from prunus.baselines.table import OURS, TABLE
from prunus.recording.pictures import BLUE

DENSE: dict[str, Any] = {"method": "dense", "kept": 1.0, "parameters": 100, "ppl64": 4.0, "perplexity": {"a.txt": {}}}
HERE: dict[str, Any] = {"machine": "here", "threads": 1, "device": "cpu", "versions": {"torch": "2"}}


def row(method: str, kept: float, ppl: float = 8.0, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "calibration": "c", "kept": kept, "kept_blocks": kept, "parameters": int(1e8 * kept),
        "ppl64": ppl, "done": True, "structured": True, "weights_mb": 100 * kept, **HERE, **more,
    }  # fmt: skip


def timed(method: str, kept: float, ratio: float, dense: float, **more: Any) -> dict[str, Any]:
    """A row with a speed: `ratio` times that of the dense model, which did `dense` tokens per second beside it."""
    speed = {"dense": {"prefill": 10 * dense, "decode": dense}, "small": {"decode": ratio * dense}}
    given = {"prefill_speedup": 2 * ratio, "decode_speedup": ratio, "speed": speed, "decoded": ratio * dense}
    return row(method, kept, **{**given, **more})


def drawn(ax: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in ax.lines}


def test_every_method_has_a_marker_of_its_own_and_the_colour_of_its_kind() -> None:
    assert set(LOOKS) == {OURS, *TABLE}
    markers = [marker for _, marker in LOOKS.values()]
    assert len(set(markers)) == len(markers)
    colours: dict[str, set[str]] = {"ours": {LOOKS[OURS][0]}}
    for name, one in TABLE.items():
        colours.setdefault(one.kind, set()).add(LOOKS[name][0])
    assert colours["ours"] == {BLUE}
    assert sum(map(len, colours.values())) == len(set().union(*colours.values()))  # no two kinds share one


def test_a_method_looks_the_same_beside_whatever_others() -> None:
    few = [DENSE, row("flap", 0.5)]
    many = [DENSE, *(row(name, 0.5) for name in LOOKS)]
    one, all_of_them = (drawn(benchpages.picture(rows).axes[0]) for rows in (few, many))
    assert all_of_them["flap"].get_color() == one["flap"].get_color() == LOOKS["flap"][0]
    assert all_of_them["flap"].get_marker() == one["flap"].get_marker() == "o"
    widths = {name: line.get_linewidth() for name, line in all_of_them.items()}
    assert all(widths[OURS] > width for name, width in widths.items() if name != OURS)


def test_lines_are_named_at_their_ends_and_ruins_below() -> None:
    rows = [DENSE, *(row(m, k, p) for m in ("llm-pruner", "llm-pruner-mix") for k, p in ((0.5, 30.0), (0.8, 9.0)))]
    rows += [row("sleb", 0.5, 30.5), row("flap", 0.8, 9.1), row("flap", 0.5, 121.0)]
    ax = benchpages.picture(rows).axes[0]
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {
        "dense", "llm-pruner, llm-pruner-mix", "sleb", "flap", "Above 120, not drawn: at 50% flap."
    }  # fmt: skip
    joined, near, alone = (texts[name] for name in ("llm-pruner, llm-pruner-mix", "sleb", "flap"))
    assert joined.get_position()[0] < 50 < 80 < alone.get_position()[0]
    assert near.get_position()[1] / joined.get_position()[1] > 1.05  # 30.5 over 30.0 would hide each other
    assert ax.get_ylim()[1] < 40  # the ruin takes no room
    assert list(ax.get_xticks()) == [50, 80]


def test_names_are_spread_as_little_as_may_be() -> None:
    assert spread([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert spread([0.3, 0.5, 0.5, 0.52], 0.1) == pytest.approx([0.3, 0.407, 0.507, 0.607], abs=1e-3)
    assert spread([0.0, 0.0, 1.0, 1.0], 0.2) == pytest.approx([0.0, 0.2, 0.8, 1.0])


def test_tokens_per_second_are_of_one_machine_at_the_dense_models_median() -> None:
    away = {"machine": "there", "calibration": "d"}
    rows = [timed("prunus", 0.5, 1.5, 10.0), timed("prunus", 0.8, 1.2, 30.0), timed("flap", 0.5, 1.4, 11.0)]
    same = timed("sleb", 0.5, 1.4, 99.0, timed_with="flap, 50%")
    assert dense_speed([*rows, same]) == {"prefill": 110.0, "decode": 11.0}
    quality, decoding, _ = benchpages.speeds(DENSE, [*rows, timed("flap", 0.8, 1.3, 500.0, **away)]).axes
    assert quality.get_xlabel().startswith("prompt, times as fast")  # the only speed that machines have in common
    assert set(drawn(quality)) == {"prunus, c", "flap, c", "flap, d", "dense"}
    assert set(drawn(decoding)) == {"prunus", "flap"}  # calibrated on d: elsewhere
    assert drawn(decoding)["prunus"].get_ydata() == pytest.approx([16.5, 13.2])
    assert decoding.collections[0].get_offsets().tolist() == [[100.0, 11.0]]
    assert list(decoding.get_xticks()) == [50, 80, 100] and "rows of here, threads: 1" in decoding.get_xlabel()


def test_scores_stand_against_parameters_and_milliseconds() -> None:
    score = {"task_mean": 0.4, "task_mean_se": 0.02}
    rows = [timed(m, k, 1.25, 10.0, **score) for m in ("prunus", "flap") for k in (0.5, 0.8)]
    size, time, *_ = benchpages.speeds(
        {**DENSE, "task_mean": 0.5, "task_mean_se": 0.01, "parameters": 100_000_000}, rows
    ).axes
    assert size.get_xlabel() == "all parameters (millions)"
    assert time.get_xlabel() == "milliseconds for 1,000 tokens of a prompt"
    assert drawn(time)["flap"].get_xdata() == pytest.approx([4000.0, 4000.0])  # 2.5 times the 100 tokens a second
    assert time.collections[-2].get_offsets().tolist() == [[10000.0, 0.5]]
    assert size.collections[-2].get_offsets().tolist() == [[100.0, 0.5]]
    ours, flap = (drawn(size)[name].get_xdata()[0] for name in (OURS, "flap"))
    assert ours < 50 < flap  # so that their errors can be seen


def test_lines_that_coincide_are_one_and_slicegpt_stands_apart() -> None:
    rows = [timed(m, k, 1.25, 10.0) for m in ("prunus", "flap", "sleb", "shortgpt") for k in (0.5, 0.8)]
    rows += [row("slicegpt", k, weights_mb=140 * k) for k in (0.5, 0.8)]  # was not timed
    rows += [row("blockpruner", k) for k in (0.48, 0.79)]  # on the line, at other shares
    weights = benchpages.speeds(DENSE, rows).axes[-1]
    assert list(drawn(weights)) == ["all but slicegpt", "slicegpt"] == [text.get_text() for text in weights.texts]
    assert not weights.collections  # of the dense model's weights nothing is known
    whole = benchpages.speeds({**DENSE, "weights_mb": 100.0}, rows).axes[-1]
    assert whole.collections[0].get_offsets().tolist() == [[100.0, 100.0]]
    two = benchpages.speeds(DENSE, rows[:4]).axes[-1]
    assert list(drawn(two)) == ["prunus, flap"]
    lines = {("a", ""): [(1.0, 10.0), (3.0, 30.0)], ("b", ""): [(2.0, 20.1)], ("c", ""): [(2.0, 20.3)]}
    assert coincident(lines) == [[("a", ""), ("b", "")], [("c", "")]]


def test_rows_of_another_machine_are_told_and_their_seconds_not_compared() -> None:
    own = [timed(name, 0.5, 1.1, 10.0) for name in ("flap", "sleb")]
    data = {"rows": own, "command": "prunus bench m", "views": benchpages.views(own), **HERE}
    text = benchpages.view(data, "cost", "f.json")
    assert "| decode speed | decoded, tokens/s |" in text and text.endswith("Figures: `f.json`.")
    moved = {**own[1], "threads": 2, "versions": {"torch": "3"}}
    text = benchpages.view({**data, "rows": [own[0], moved]}, "cost", "f.json")
    assert "| decode speed |\n" in text and "tokens/s" not in text
    assert text.endswith("Made otherwise: sleb (threads: 2, torch 3).")
    text = benchpages.view({**data, "rows": [{**one, "machine": "there"} for one in own]}, "cost", "f.json")
    assert "decoded, tokens/s" in text  # of one machine, if not the file's
    assert text.endswith("Made otherwise: all rows (on there).")


def test_rows_with_settings_of_their_own_are_told() -> None:
    def typed(*settings: str) -> str:
        return " ".join(["prunus bench m --methods x --keep 0.5 --seed 0", *settings, "--out elsewhere"])

    rows = [row(m, k, calibration=c, command=typed()) for m in ("flap", "shen") for c in ("c", "d") for k in (0.5, 0.8)]
    data = {"rows": rows, "command": "prunus bench m --methods flap shen --keep 0.8 0.5 --seed 0 --out o", **HERE}
    assert benchpages.otherwise(data, rows) == ""  # methods, shares and directories are no settings

    def told(*numbers: int) -> str:
        for number, one in enumerate(rows):
            one["command"] = typed("--no-speed", "--set rival.window=256") if number in numbers else typed()
        return benchpages.otherwise(data, rows)

    words = "(with `--set rival.window=256`)."
    assert told(4, 5, 6, 7) == f"Made otherwise: shen {words}"
    assert told(0, 1, 4, 5, 6, 7) == f"Made otherwise: flap on c and shen {words}"
    assert told(5) == f"Made otherwise: shen on c at 80% {words}"
    data["command"] += " --set rival.window=256"
    for one in rows[4:]:
        one["command"] = typed("--set rival.window=256")
    rows[5]["command"] = typed()
    assert benchpages.otherwise(data, rows[4:]) == (
        "Made otherwise: shen on c at 80% (without `--set rival.window=256`)."
    )


def test_the_page_of_a_bench_tells_it_too(tmp_path: Path) -> None:
    rows = [DENSE, timed("flap", 0.5, 1.1, 10.0), row("sleb", 0.5, threads=8)]
    data = {"rows": rows, "command": "prunus bench m", "views": benchpages.views(rows), **HERE}
    assert "Made otherwise: sleb (threads: 8)." in benchpages.write(tmp_path, data).read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"bench.png", "bench-speed.svg", "bench.json"}
