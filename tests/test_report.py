"""The report shows every number it was given, in text and pictures, whatever was or was not measured."""

from __future__ import annotations

import json
import math
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hurry import painted
from matplotlib.patches import Rectangle

from prunus.errors import UserError
from prunus.recording import pictures, tradeoffs
from prunus.recording.pictures import Network, Tried
from prunus.recording.report import ReportData, markdown, table, write_report
from prunus.timing.timetable import Grid, Request, Times, Timetable

pytestmark = pytest.mark.usefixtures("paint")
N_LAYERS = 6
TEXT = "WikiText-2 test, 5 × 2048 tokens"


@pytest.fixture
def paint() -> Iterator[None]:
    with painted():
        yield


def network(name: str, share: float, **measured: object) -> Network:
    layers = [(3, 3, 1536)] * N_LAYERS
    if share < 1:
        layers = [(2, 3, int(1536 * share)), (3, 1, 800), (0, 0, 640), (1, 1, 0), (3, 2, 1536), (0, 0, 0)]
    parameters = int(134_515_008 - (1 - share) * 106_202_880)
    return Network(
        name=name,
        kept_blocks=share,
        kept_all=parameters / 134_515_008,
        parameters=parameters,
        n_bytes=2 * parameters,
        hidden=576,
        layers=layers,
        **measured,  # type: ignore[typeddict-item]
    )


def report_data() -> ReportData:
    tried = [
        Tried(method=m, kept=0.8 + 0.001 * i, kl_nats=0.3 + 0.1 * i) for m in ("switch", "random") for i in range(9)
    ]
    return ReportData(
        model="SmolLM2-135M-Instruct",
        family="llama",
        keep_of="blocks",
        dense=network("dense", 1.0, perplexity={TEXT: 23.69}, prefill_speedup=1.0, sample="A vast sea."),
        chosen=[
            network(
                "keep-0.8",
                0.8,
                kl_nats=0.2519,
                kl_se=0.0123,
                perplexity={TEXT: 28.71},
                prefill_speedup=1.234,
                decode_speedup=1.345,
                uniform=False,
                path="models/keep-0.8",
                sample="A ``` fence\nand | a bar.",
            ),
            network("keep-0.5", 0.5, kl_nats=1.217, perplexity={TEXT: 61.47}, uniform=True, path="models/keep-0.5"),
        ],
        tried=tried,
        steps=[
            {"name": "calibration", "seconds": 38.25, "forward_tokens": 32768, "peak_bytes": 1_250_000_000},
            {"name": "search", "seconds": 400.5, "forward_tokens": 910_001, "peak_bytes": 2_340_000_000},
        ],
        command="prunus compress demo --out runs/demo --keep 0.8 0.5",
        seed=17,
        source={"id": "demo", "revision": None, "kind": "gguf", "sha256": "ab12"},
        calibration={"source": "generated", "samples": 32, "length": 1024, "token_hash": "cd34"},
        config={"keep": [0.8, 0.5], "score": "obs"},
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        machine="2 cores, 24 GiB",
        prompt="The sea is",
    )


def timed_data() -> ReportData:
    """The same run with a budget of milliseconds, and the table that it went by."""
    data = report_data()
    data["dense"] |= {"predicted_ms": 512.5, "predicted_speedup": 1.0}
    data["chosen"][0] |= {"predicted_ms": 301.25, "predicted_speedup": 1.701, "measured_ms": 322.75}
    data["chosen"][0] |= {"measured_speedup": 1.588, "predicted_tps": 61.5, "measured_tps": 57.25}
    times = Times(5.0, 0.5, ((1.0, 1.5), (2.0, 2.5)), (1.0, 1.25, 3.0))
    key = {"runtime": "torch", "device": "cpu, Abacus", "dtype": "float32", "threads": 2}
    grid = Grid((1, 2), (1, 3), (64, 128, 192))
    table = Timetable(key, Request(512, 2, 64), 576, grid, times, times, spread=0.031, check=0.012)
    return {**data, "latency": json.loads(table.to_json())}


def test_times_stand_beside_each_other_as_predicted_and_measured(tmp_path: Path) -> None:
    text = markdown(timed_data())
    given = ["512.5", "301.2", "322.8", "1.70×", "1.59×", "61.5", "57.25", "2 x 512", "cpu, Abacus", "3.1 %", "1.2 %"]
    assert [g for g in given if g not in text] == []
    assert "Quality against time" not in markdown(report_data())
    write_report(tmp_path, timed_data())
    assert png_size(tmp_path / "report" / "latency.png")[0] > 500
    assert png_size(tmp_path / "report" / "staircase.png")[0] > 500


def test_the_stairs_show_every_width() -> None:
    table = Timetable.from_json(json.dumps(timed_data()["latency"]))
    figure = pictures.staircase(table)
    attention, mlp = figure.axes[:2]
    assert [t.get_text() for t in attention.get_xticklabels()] == ["1×1", "2×1", "1×3", "2×3"]
    assert [patch.get_height() for patch in attention.patches] == [1.0, 2.0, 1.5, 2.5]
    assert list(mlp.lines[1].get_ydata()) == [1.0, 1.25, 3.0]


def test_predicted_and_measured_points_are_told_apart() -> None:
    data = timed_data()
    (axes,) = pictures.front_of_times(data["dense"], data["chosen"]).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["by the table", "measured"]
    assert list(axes.lines[0].get_xdata()) == [301.25, 322.75]  # what lies between the two


def test_memory_of_a_budget_has_a_column() -> None:
    data = report_data()
    data["chosen"][1] |= {"memory_bytes": 181_250_000}
    assert "weights and KV cache" in markdown(data)
    assert "181.2 MB" in markdown(data)


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def texts_of(figure: pictures.Figure) -> str:
    return "\n".join(t.get_text() for ax in figure.axes for t in ax.texts)


def test_the_text_holds_every_number_given() -> None:
    data = report_data()
    text = markdown(data)
    given = ["134.52 M", "113.27 M", "81.41 M", "80.00 %", "84.21 %", "226.5 MB", "0.2519 ± 0.012", "1.217"]
    given += ["23.69", "28.71", "61.47", "1.23×", "1.34×", "38.2", "400.5", "32,768", "910,001", "1.25 GB", "2.34 GB"]
    given += ["438.8", "942,769", "`17`", "ab12", "cd34", "2.13.0", "5.23.0", data["command"], "2 cores, 24 GiB"]
    assert [g for g in given if g not in text] == []
    assert "revision" not in text  # a fact that is not known is left out


def test_dropped_sub_layers_are_named_and_drawn() -> None:
    data = report_data()
    assert "- keep-0.8: attention of layer 2, 5; MLP of layer 3, 5" in markdown(data)
    figure = pictures.kept(data["dense"], data["chosen"])
    hatched = [
        sum(isinstance(p, Rectangle) and p.get_hatch() is not None for p in ax.patches) for ax in figure.axes[:2]
    ]
    assert hatched == [4, 4]  # attention, MLP: two of each in each of the two networks
    words = texts_of(figure)
    assert "2×3" in words
    assert "3×1" in words


def test_a_cut_hidden_size_is_in_the_picture() -> None:
    data = report_data()
    data["chosen"][0]["hidden"] = 512
    labels = [t.get_text() for t in pictures.kept(data["dense"], data["chosen"]).axes[0].get_yticklabels()]
    assert labels == ["keep-0.8\nhidden 512 of 576", "keep-0.5"]


def test_a_network_far_from_the_dense_one_is_called_out() -> None:
    data = report_data()
    assert "**Careful: keep-0.5.**" in markdown(data)
    data["chosen"][1]["kl_nats"] = 0.9
    assert "Careful" not in markdown(data)


def test_loading_says_which_checkpoints_are_plain() -> None:
    text = markdown(report_data())
    plain, _, own = text.partition("Layers of different widths")
    assert 'from_pretrained("models/keep-0.5")' in plain
    assert 'from_pretrained("models/keep-0.8", trust_remote_code=True)' in own


def test_samples_cannot_break_the_page() -> None:
    text = markdown(report_data())
    assert "    A ``` fence\n    and | a bar." in text
    cell = markdown({**report_data(), "seed": 3, "source": {"id": "a|b\nc"}})  # type: ignore[typeddict-item]
    assert "`a\\|b c`" in cell


def test_files_and_pictures(tmp_path: Path) -> None:
    data = report_data()
    curve = {"kept": [0.0, 0.5, 1.0], "error": [1.0, 0.2, 0.0]}
    data["error_curves"] = [{"layer": i, "part": p, **curve} for i in (0, 1) for p in ("attention", "mlp")]  # type: ignore[typeddict-item, misc]
    path = write_report(tmp_path, data)
    assert path == tmp_path / "report.md"
    names = {"front", "kept", "cost", "errors"}
    assert {p.name for p in (tmp_path / "report").iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "svg")}
    for name in names:
        width, height = png_size(tmp_path / "report" / f"{name}.png")
        assert 900 < width < 2600, (name, width)
        assert 150 < height < 1600, (name, height)
        assert ElementTree.parse(tmp_path / "report" / f"{name}.svg").getroot().tag.endswith("svg")
        assert f"report/{name}.png" in path.read_text()
    assert markdown(json.loads((tmp_path / "report.json").read_text())) == path.read_text()


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    data = report_data()
    one, two = (pictures.save(pictures.kept(data["dense"], data["chosen"]), tmp_path / n / "kept") for n in "ab")
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_gpu_memory_is_shown_where_there_is_some(tmp_path: Path) -> None:
    data = report_data()
    assert "GPU" not in markdown(data)
    data["steps"][1]["peak_cuda_bytes"] = 3_210_000_000
    assert "3.21 GB" in markdown(data)
    assert len(pictures.cost(data["steps"]).axes) == 4


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    data = report_data()
    (tmp_path / "kept.svg").mkdir()  # a directory stands where the picture belongs
    with pytest.raises((UserError, OSError)):
        pictures.save(pictures.kept(data["dense"], data["chosen"]), tmp_path / "kept")
    assert {p.name for p in tmp_path.iterdir()} == {"kept.png", "kept.svg"}


def test_the_front_shows_dense_chosen_and_tried() -> None:
    data = report_data()
    divergence, perplexity = pictures.front(data["dense"], data["chosen"], data["tried"]).axes
    assert {"113.3 M", "81.41 M", "dense, 134.5 M"} <= {t.get_text() for t in divergence.texts}
    assert {"28.71", "61.47", "23.69"} <= {t.get_text() for t in perplexity.texts}
    legend = divergence.get_legend()
    assert legend is not None
    labels = [t.get_text() for t in legend.get_texts()]
    assert labels == ["chosen, held-out tokens", "random, tried (9)", "switch, tried (9)"]


def test_candidates_off_the_scale_are_counted() -> None:
    data = report_data()
    data["tried"] += [Tried(method="random", kept=0.8, kl_nats=v) for v in (40.0, math.inf, math.nan)]
    legend = pictures.front(data["dense"], data["chosen"], data["tried"]).axes[0].get_legend()
    assert legend is not None
    assert "random, tried (12, 3 off the scale)" in [t.get_text() for t in legend.get_texts()]


@pytest.mark.parametrize("missing", ["perplexity", "kl_nats", "everything"])
def test_what_was_not_measured_is_left_out(tmp_path: Path, missing: str) -> None:
    data = report_data()
    data["chosen"] = data["chosen"][:1]
    data["tried"], data["steps"] = [], []
    measured = ("kl_nats", "kl_se", "perplexity", "prefill_speedup", "decode_speedup", "sample", "path", "uniform")
    for n in (data["dense"], *data["chosen"]):
        for key in measured if missing == "everything" else (missing, "kl_se"):
            n.pop(key, None)  # type: ignore[misc]
    text = write_report(tmp_path, data).read_text()
    panels = pictures.front(data["dense"], data["chosen"]).axes
    assert len(panels) == 1
    assert "One smaller network of 113.27 M" in text
    assert "What it cost" not in text
    assert ("perplexity" in text) == (missing == "kl_nats")
    assert ("KL to the dense model (nats)" in text) == (missing == "perplexity")
    assert png_size(tmp_path / "report" / "front.png")[0] > 800


def test_a_run_without_a_network_still_reports(tmp_path: Path) -> None:
    data = report_data()
    data["chosen"], data["tried"] = [], []
    text = write_report(tmp_path, data).read_text()
    assert "## Figures" in text
    assert "What was kept" not in text


def test_table_aligns_numbers_to_the_right() -> None:
    assert table(["name", "n"], [["a", "1"]]) == "| name | n |\n| --- | ---: |\n| a | 1 |"


def test_numbers_of_a_front_do_not_lie_on_each_other() -> None:
    values = [(9e7, 0.9), (9e7 + 10, 0.9), (1.1e8, 0.3)]
    side: dict[str, Any] = {
        "tried": [[kl, n] for n, kl in values], "hypervolume": 0.5,
        "front": [{"point": k + 1, "values": {"kl": kl, "parameters": n}, "errors": {"kl": 0.1, "parameters": None}}
                  for k, (n, kl) in enumerate(values)],
    }  # fmt: skip
    titles = {"objectives": ["kl", "parameters"], "titles": ["KL to the trained full network", "parameters"]}
    sides = {"searched": side, "control": side, "dense": [0.0, 1.345e8]}
    found = {**titles, **sides, "method": "levels", "evaluations": 3}
    (axes,) = tradeoffs.searched_front(found).axes
    assert [text.get_text() for text in axes.texts] == ["1", "3"]
    assert axes.xaxis.get_major_formatter()(9e7) == "90 M"
    legend = axes.get_legend()
    assert legend is not None and "full network" in [text.get_text() for text in legend.get_texts()]


def test_bins_that_stayed_empty_are_told() -> None:
    drawn = {"random": [3, 1], "pool": [2, 2], "least": 1e6, "most": 5e6, "sampler": "grid-params"}
    page = markdown({**report_data(), "draws": drawn})  # of an older version: nothing is known of its bins
    assert "report/sizes.png" in page and "empty" not in page
    page = markdown({**report_data(), "draws": {**drawn, "empty": [], "bins": 4, "attempts": 4000}})
    assert "stayed empty" not in page
    page = markdown({**report_data(), "draws": {**drawn, "empty": [[1e6, 2e6], [4.5e6, 5e6]], "bins": 4,
                                                "attempts": 4000}})  # fmt: skip
    assert "2 of 4 bins stayed empty after 4,000 draws" in page
    assert "in millions of parameters: 1 to 2, 4.5 to 5." in page
