"""How far our rival methods are from figures that others measured: benchmarks/results/agreement.json.

    python benchmarks/agreement.py baselines.json bench.json corpora.json slice4.json

The first file holds perplexities of the same model on the same test windows, by method, length and share; the others
are bench.json files of `prunus bench`, of which a later one's row counts before an earlier one's. The difference is
that of the log-perplexities, in per cent of theirs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import record

# their name -> ours; their Wanda-sp judges all layers in the dense model
NAMES = {
    "FLAP": "flap",
    "wanda-sp": "wanda-sp-dense",
    "SliceGPT (original code, v4.41, CPU)": "slicegpt",
    "ShortGPT": "shortgpt",
    "magnitude": "magnitude",
    "LLM-Pruner (re-impl, Taylor param_first, block)": "llm-pruner",
}
CALIBRATION = "wiki.valid.raw"


def rows_of(theirs: dict[str, Any], benches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each length and share that both have."""
    own: dict[tuple[str, float], tuple[dict[str, Any], dict[str, int]]] = {}
    for bench in benches:
        for row in bench["rows"]:
            if row.get("calibration") == CALIBRATION and row.get("done"):
                own[row["method"], row["kept"]] = row, bench["calibration"]
    rows = []
    for length in (2048, 128):
        for name, ours in NAMES.items():
            for share, ppl in theirs[f"ppl{length}"][name].items():
                if (ours, float(share)) in own:
                    row, read = own[ours, float(share)]
                    rows.append(
                        {
                            "method": f"{ours}, {length}", "kept": float(share), "ours": row[f"ppl{length}"],
                            "theirs": ppl, "windows": read["samples"], "command": row["command"],
                            "percent": 100 * (math.log(row[f"ppl{length}"]) / math.log(ppl) - 1),
                        }
                    )  # fmt: skip
    return rows


def main() -> int:
    """Read, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("benches", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "agreement.json")
    options = parser.parse_args()
    benches = [json.loads(path.read_text(encoding="utf-8")) for path in options.benches]
    rows = rows_of(json.loads(options.theirs.read_text(encoding="utf-8")), benches)
    pivot = {"title": "kept of the blocks", "index": "method", "across": "kept", "across_format": ".0%"}
    note = "Log-perplexity against theirs, per cent; behind the method the length of the test windows."
    view = {**pivot, "value": "percent", "format": "+.1f", "note": note}
    record.write(options.results, rows, {"percent": view})
    for row in rows:
        print(f"{row['method']:22} {row['kept']:.0%} {row['ours']:10.2f} {row['theirs']:10.2f} {row['percent']:+.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
