"""What `activate` costs, on the shapes of SmolLM2-135M with random weights: benchmarks/results/activate.json.

1. Milliseconds to enter and leave it. 2. A forward under it against the same forward of the extracted model,
interleaved (A B B A ...), so that a busy machine disturbs both alike; the ratio is the median over pairs. Times are
wall clock and processor time of this process, because machines are shared.

    python benchmarks/activate.py --threads 1 --repeats 9 --length 256
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import record
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prunus.models.families import family_of
from prunus.models.slicing import activate, extract
from prunus.subnetwork import LayerShape, SubNetwork

LAYERS, GROUPS, PER_GROUP, NEURONS, HIDDEN = 30, 3, 3, 1536, 576


def candidates() -> dict[str, SubNetwork]:
    """Sub-networks that cut along different dimensions."""
    rng = random.Random(0)

    def alike(hidden: int, *shape: int) -> SubNetwork:
        return SubNetwork(hidden, (LayerShape(*shape),) * LAYERS)

    ragged = [
        LayerShape(rng.randint(1, GROUPS), rng.randint(1, PER_GROUP), rng.randrange(256, NEURONS, 64))
        for _ in range(LAYERS)
    ]
    ragged[20], ragged[25] = LayerShape(0, 0, 512), LayerShape(2, 3, 0)
    return {
        "neurons and groups (views)": alike(HIDDEN, 2, 3, 1024),
        "neurons and query heads": alike(HIDDEN, 3, 2, 1024),
        "everything": alike(512, 2, 2, 1024),
        "ragged, two sub-layers dropped": SubNetwork(HIDDEN, tuple(ragged)),
    }


def _seconds(run: Any) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(model: Any, sub: SubNetwork, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Times of one candidate."""
    family = family_of(model.config)
    small: Any = extract(model, family, sub)

    def empty() -> None:
        with activate(model, family, sub):
            pass

    switching = [_seconds(empty) for _ in range(3 * repeats)]
    ratios, forwards = [], []
    with activate(model, family, sub):
        model(ids, use_cache=False)  # the first forward of each is not counted
    small(ids, use_cache=False)
    for k in range(repeats):
        pair = {}
        for who in ("activated", "extracted") if k % 2 else ("extracted", "activated"):
            if who == "activated":
                with activate(model, family, sub):
                    pair[who] = _seconds(lambda: model(ids, use_cache=False))
            else:
                pair[who] = _seconds(lambda: small(ids, use_cache=False))
        ratios.append([a / e for a, e in zip(pair["activated"], pair["extracted"], strict=True)])
        forwards.append(pair["extracted"])
    with activate(model, family, sub):
        difference = (model(ids, use_cache=False).logits - small(ids, use_cache=False).logits).abs().max()
    return {
        "enter_and_leave_ms": round(1e3 * statistics.median(wall for wall, _ in switching), 2),
        "enter_and_leave_cpu_ms": round(1e3 * statistics.median(cpu for _, cpu in switching), 2),
        "extracted_forward_ms": round(1e3 * statistics.median(wall for wall, _ in forwards), 1),
        "activated_over_extracted": round(statistics.median(wall for wall, _ in ratios), 4),
        "activated_over_extracted_cpu": round(statistics.median(cpu for _, cpu in ratios), 4),
        "largest_logit_difference": float(difference),
    }


def views() -> dict[str, Any]:
    """How benchmarks/render.py shows the rows."""
    columns = [
        ["network", "sub-network", ""],
        ["dtype", "type", ""],
        ["enter_and_leave_ms", "enter and leave, ms", ".1f"],
        ["enter_and_leave_cpu_ms", "of the processor, ms", ".1f"],
        ["extracted_forward_ms", "forward of the extracted model, ms", ".0f"],
        ["activated_over_extracted", "activated / extracted", ".3f"],
        ["activated_over_extracted_cpu", "of the processor", ".3f"],
        ["largest_logit_difference", "largest difference of logits", ".2g"],
    ]
    return {"main": {"columns": columns, "note": "Medians; goals: 15 ms for thirty layers, a ratio of 1.05."}}


@torch.no_grad()
def main() -> None:
    """Measure every candidate in every type, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "activate.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=GROUPS * PER_GROUP, num_key_value_heads=GROUPS, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    rows = []
    for dtype in options.dtypes:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        model.to(options.device)
        ids = torch.randint(0, 49152, (options.batch, options.length), device=options.device)
        rows += [
            {"network": name, "dtype": dtype, **measure(model, sub, ids, options.repeats)}
            for name, sub in candidates().items()
        ]
    record.write(options.results, rows, views(), threads=options.threads, length=options.length)


if __name__ == "__main__":
    main()
