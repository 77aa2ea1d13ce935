"""Redraw the tables of README.md and benchmarks/README.md from benchmarks/results/*.json, so that no figure is typed.

A block between `<!-- results:NAME -->` and `<!-- /results:NAME -->` is replaced by the view NAME: `FILE` or `FILE.VIEW`
of benchmarks/results/FILE.json. `--check` changes nothing and exits with 1 if a block is not what the files say.
The format of a results file is described in benchmarks/README.md. The pictures of `prunus bench` (`PICTURES`) and of
training (trained.py) are drawn too, from the same files, into docs/pictures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import trained
from matplotlib.figure import Figure

from prunus.baselines import benchpages
from prunus.recording import pictures, tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "benchmarks/README.md")
# a picture's name -> the results file, and whether it shows measured speed
PICTURES = {
    "bench": ("bench", False),
    "bench-tasks": ("bench_tasks", True),
    "corpora": ("corpora", False),
    "corpora-speed": ("corpora", True),
}
BLOCK = re.compile(r"^<!-- results:(?P<name>[\w.-]+) -->\n.*?^<!-- /results:(?P=name) -->$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"^<!-- /?results:[\w.-]+ -->$", re.MULTILINE)


def render(page: str, results: Path) -> str:
    """The page with every block redrawn; raises ValueError for a marker without its partner."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- results:{name} -->\n{view(name, results)}\n<!-- /results:{name} -->"

    left = MARK.search(BLOCK.sub("", page))
    if left:
        raise ValueError(f"{left[0]} has no partner; a block begins with results:NAME and ends with /results:NAME")
    return BLOCK.sub(block, page)


def view(name: str, results: Path) -> str:
    """One view as Markdown: its table, a sentence and, folded up, what was typed where to get it."""
    file, _, wanted = name.partition(".")
    path = results / f"{file}.json"
    if not path.exists():
        return f"*No figures yet: `benchmarks/results/{file}.json` does not exist.*"
    data = json.loads(path.read_text(encoding="utf-8"))
    shown = benchpages.view if data["command"].startswith("prunus bench ") else tables.view
    table, _, typed = shown(data, wanted, f"benchmarks/results/{file}.json").rpartition("\n\n")
    return f"{table}\n\n<details><summary>command, machine, versions</summary>\n\n{typed}\n\n</details>"


def picture(name: str, results: Path) -> Figure:
    """A picture of a bench as `prunus bench` draws it."""
    file, fast = PICTURES[name]
    rows = json.loads((results / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    if not fast:
        return benchpages.picture(rows)
    return benchpages.speeds(rows[0], [row for row in rows if row.get("structured")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Redraw or check every page; returns the exit status."""
    parser = argparse.ArgumentParser(description="Redraw the tables of the README files from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stale = []
    for name in PAGES:
        path: Path = options.root / name
        old = path.read_text(encoding="utf-8")
        new = render(old, options.root / "benchmarks" / "results")
        if new != old:
            stale.append(name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if not options.check and options.root == ROOT:
        results = ROOT / "benchmarks" / "results"
        drawings = {name: picture(name, results) for name in PICTURES} | {"trained": trained.picture(results)}
        for name, drawn in drawings.items():
            _, svg = pictures.save(drawn, ROOT / "docs" / "pictures" / name)
            svg.unlink()  # pages show the PNG
    for name in stale:
        print(f"{name}: {'out of date, run `make results`' if options.check else 'redrawn'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
