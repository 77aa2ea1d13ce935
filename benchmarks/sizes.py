"""How many parameters drawn sub-networks have, for every way of drawing: benchmarks/results/sizes.json, and a picture.

    python benchmarks/sizes.py --model demo --space llama_joint --picture docs/pictures/sizes-smollm2

The skew that bins cure (Sukthanker et al. 2024, arXiv:2410.06479v1, figure 2a-b): 2,000 draws of each way, the layers
in their own order. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import record

from prunus.models import costs
from prunus.models.families import family_of
from prunus.models.loading import load
from prunus.recording import pictures
from prunus.searching.grids import grid_of
from prunus.subnetwork import SubNetwork
from prunus.training import draws

SAMPLERS: dict[str, draws.Sampler] = {
    "uniform draws": "random",
    "grid": "grid",
    "grid-params": "grid-params",
    "calibrated-magnitude": "calibrated-magnitude",
}


def main() -> int:
    """Draw, count, write the results file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--space", default="llama_joint")
    parser.add_argument("--bins", type=int, default=22, help="of the pools, and of the picture")
    parser.add_argument("--picture", type=Path, default=Path("runs/sizes"), help="without the suffix")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "sizes.json")
    options = parser.parse_args()
    model = load(options.model).model
    family = family_of(model.config)
    space, layout = grid_of(model.config, options.space), costs.layout(model, family)

    def size(sub: SubNetwork) -> float:
        return float(costs.parameters(layout, sub, "all"))

    score, shown, rows = draws.magnitude(model, family), dict[str, list[int]](), list[dict[str, Any]]()
    for name, sampler in SAMPLERS.items():
        pool = draws.pool_of(space, size, sampler, bins=options.bins, score=score)
        shown[name] = draws.histogram(space, size, pool, bins=options.bins)
        total, counts = sum(shown[name]), shown[name]
        edges = np.linspace(size(space.smallest()), size(space.largest()), len(counts) + 1) / 1e6
        half = int(np.searchsorted(np.cumsum(counts), total / 2))  # the bin that the median lies in
        rows.append(
            {
                "sampler": name,
                "pool": len(pool.networks) or None,
                "attempts": pool.attempts or None,
                "fullest": max(counts) / total,
                "empty": counts.count(0),
                "median": f"{edges[half]:.0f} to {edges[half + 1]:.0f}",
                "counts": counts,
            }
        )
    pictures.save(pictures.sizes(shown, size(space.smallest()), size(space.largest())), options.picture)
    columns = [
        ["sampler", "drawn", ""],
        ["pool", "networks in the pool", ""],
        ["attempts", "draws for the bins, 1,000 a bin at most", ","],
        ["fullest", "of 2,000 draws in the fullest bin", ".0%"],
        ["empty", f"empty bins of {options.bins}", ""],
        ["median", "half of them are below, million parameters", ""],
    ]
    record.write(options.results, rows, {"main": {"columns": columns}}, space=options.space)
    return 0


if __name__ == "__main__":
    sys.exit(main())
