"""A front that `prunus search RUN --front` has found, beside its control: benchmarks/results/front.json.

    python benchmarks/fronts.py RUN --picture docs/pictures/searched

Rows are what the best network within a few costs is worth, searched and at random: the lowest first objective of a
front among its networks whose second objective is at most so large. Nothing is computed here but the picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import record

from prunus.recording import pictures, tradeoffs

SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # of the dense model's second objective


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each side and cost."""
    first, second = found["objectives"][:2]
    dense = found["dense"][1]
    rows = []
    for side, name in (("searched", f"{found['method']}, searched"), ("control", "random, the control")):
        front = found[side]["front"]
        for share in SHARES:
            within = [point for point in front if point["values"][second] <= share * dense]
            best = min(within, key=lambda point: point["values"][first], default=None)
            rows.append(
                {
                    "search": name, "share": share, "hypervolume": found[side]["hypervolume"],
                    "value": best and best["values"][first], "se": best and best["errors"][first],
                    "cost": best and best["values"][second], "kept": best and best["kept"],
                }
            )  # fmt: skip
    return rows


def main() -> int:
    """Write the results file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path, help="FILE.png and FILE.svg")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "front.json")
    options = parser.parse_args()
    found = json.loads((options.run / "search" / "front.json").read_text())
    manifest = json.loads((options.run / "manifest.json").read_text())["config"]
    if manifest["train"]["data"]:  # runs of earlier versions say otherwise
        found["titles"] = [one.replace("the dense model", "the trained full network") for one in found["titles"]]
    second = found["objectives"][1]
    shares = {side: found[side]["hypervolume"] for side in ("searched", "control")}
    view = {
        "title": f"{second}, at most, of the dense model's", "index": "search", "across": "share",
        "across_format": ".0%", "value": "value", "format": ".3f", "best": "min",
        "note": f"{found['titles'][0]}, held-out text. {found['evaluations']} evaluations each; hypervolume "
        f"{shares['searched']:.3f} searched, {shares['control']:.3f} at random. {second} of the dense model: "
        f"{found['dense'][1]:,.0f}.",
    }  # fmt: skip
    record.write(options.results, rows_of(found), {"main": view}, run=manifest, front=found)
    if options.picture:
        pictures.save(tradeoffs.searched_front(found), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
