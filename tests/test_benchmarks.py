"""The tables of the pages are what the results files say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prunus.recording import tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def renderer() -> ModuleType:
    sys.path.append(str(ROOT / "benchmarks"))  # as where a script is run
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    rows = [
        {"method": m, "kept": k, "perplexity": p}
        for m, k, p in (("dense", 0.8, 23.69), ("ours", 0.8, 28.512), ("rival", 0.8, 36.17), ("rival", 0.5, 469.0))
    ]
    results = {
        "command": "prunus bench demo",
        "machine": "2 cores",
        "versions": {"torch": "2.13.0"},
        "rows": rows,
        "views": {
            "main": {
                "title": "perplexity",
                "index": "method",
                "across": "kept",
                "across_format": ".0%",
                "value": "perplexity",
                "format": ".2f",
                "best": "min",
                "reference": ["dense"],
            },
            "long": {"where": {"method": "rival"}, "columns": [["kept", "kept", ".0%"], ["perplexity", "ppl", ".1f"]]},
        },
    }
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "wiki.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("# A\n<!-- results:wiki -->\n<!-- /results:wiki -->\nend\n")
    page = (
        "<!-- results:wiki.long -->\nold\n<!-- /results:wiki.long -->\n<!-- results:none -->\n<!-- /results:none -->\n"
    )
    (tmp_path / "benchmarks" / "README.md").write_text(page)
    return tmp_path


def test_blocks_are_drawn_from_the_files(renderer: ModuleType, pages: Path) -> None:
    assert renderer.main(["--root", str(pages)]) == 0
    text = (pages / "README.md").read_text()
    assert "| perplexity | 80% | 50% |" in text
    assert "| ours | **28.51** | – |" in text
    assert "| rival | 36.17 | **469.00** |" in text
    assert "| dense | 23.69 | – |" in text  # a reference does not compete
    assert "`prunus bench demo` on 2 cores; torch 2.13.0." in text
    assert text.endswith("end\n")
    other = (pages / "benchmarks" / "README.md").read_text()
    assert "| 80% | 36.2 |\n| 50% | 469.0 |" in other
    assert "old" not in other
    assert "No figures yet" in other


def test_rows_of_a_bench_that_were_made_otherwise_are_told(renderer: ModuleType, pages: Path) -> None:
    path = pages / "benchmarks" / "results" / "wiki.json"
    data = json.loads(path.read_text())
    data["rows"][1] |= {"machine": "2 cores", "command": "prunus bench demo --set rival.window=256"}
    data["rows"][2]["machine"] = data["rows"][3]["machine"] = "8 cores"
    told = "Made otherwise: ours (with `--set rival.window=256`); rival (on 8 cores)."
    for command, known in (("prunus bench demo", True), ("python benchmarks/wiki.py", False)):
        path.write_text(json.dumps({**data, "command": command}))
        renderer.main(["--root", str(pages)])
        assert (told in (pages / "README.md").read_text()) is known  # other files' rows have commands of other programs


def test_a_ruin_has_two_digits_and_a_part_its_own_command() -> None:
    rows = [
        {"part": p, "way": w, "ppl": v} for p, w, v in (("a", "x", 5754299.76), ("a", "y", 99999.9), ("b", "x", 1.0))
    ]
    one = {"where": {"part": "a"}, "columns": [["way", "way", ""], ["ppl", "ppl", ".2f"]]}
    data = {
        "rows": rows,
        "views": {"one": one},
        "machine": "m",
        "versions": {},
        "command": "a; b",
        "commands": {"a": "a"},
        "origins": {"b": {"machine": "another", "versions": {"torch": "2"}}},
    }
    text = tables.view(data, "one", "f.json")
    assert "| x | 5.8e6 |\n| y | 99999.90 |" in text
    assert "`a` on m" in text
    assert "`a; b` on another; torch 2." in tables.view(
        {**data, "views": {"one": {**one, "where": {"part": "b"}}}}, "", ""
    )
    assert tables.number(135213120, ",d") == "135,213,120"
    assert tables.number(float("inf"), ".2f") == "inf"


def test_check_finds_a_typed_number(renderer: ModuleType, pages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert renderer.main(["--root", str(pages), "--check"]) == 1
    renderer.main(["--root", str(pages)])
    assert renderer.main(["--root", str(pages), "--check"]) == 0
    page = pages / "README.md"
    page.write_text(page.read_text().replace("28.51", "24.99"))
    capsys.readouterr()
    assert renderer.main(["--root", str(pages), "--check"]) == 1
    assert capsys.readouterr().out == "README.md: out of date, run `make results`\n"
    assert "24.99" in page.read_text()


def test_a_marker_without_its_partner_is_refused(renderer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no partner"):
        renderer.render("<!-- results:a -->\n", tmp_path)


def test_the_pages_of_this_repository_are_up_to_date(renderer: ModuleType) -> None:
    assert renderer.main(["--check"]) == 0
