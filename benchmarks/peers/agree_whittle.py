"""Are our sub-networks and importance scores those of whittle, the library of Sukthanker et al., on the same weights?

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    (echo torch==2.13.0; echo 'pyarrow<22') > pins.txt
    PEER/bin/pip install whittle -c pins.txt
    PEER/bin/pip uninstall -y torchvision
    python benchmarks/peers/agree_whittle.py MODEL --python PEER/bin/python --calibration FILE --text FILE

whittle stands on litgpt and an older transformers than ours, so it runs in an environment of its own (run_whittle.py),
where litgpt converts the directory MODEL without a hub; its numpy is too old for later pyarrows, and torchvision, which
it does not need, cannot be imported beside a torch without CUDA. Compared are sub-networks of the same prefixes of the
unsorted model (set_sub_network against `activate`; its extract_current_sub_network), what is counted as their
parameters, and the importance by activations, of which whittle has the sum over the layers (all windows are one batch).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import parts
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunus.evaluation import chunked, parameters, perplexity, text_ids
from prunus.models.families import family_of, full
from prunus.models.loading import load
from prunus.models.slicing import activate, extract
from prunus.scoring import importance
from prunus.subnetwork import LayerShape, SubNetwork

AGGREGATORS = ("mean", "norm", "norm-mean", "mean-norm", "mean-variance", "norm-variance")
UNITS = {"mlp": "neurons", "q_per_kv": "query heads", "kv_heads": "KV groups", "hidden": "hidden channels"}
COLUMNS = [
    ["what", "sub-network", ""],
    ["parameters", "parameters, ours", ",d"],
    ["their_parameters", "by compute_parameters, less the tied matrix", "+,d"],
    ["extracted", "of what it extracts, the same", "+,d"],
    ["perplexity", "perplexity, ours", ".4f"],
    ["their_perplexity", "whittle's", ".4f"],
    ["difference", "largest difference of logits", ".2g"],
    ["extracted_difference", "of its extracted model from itself", ".2g"],
]
SCORES = {
    "title": "units",
    "index": "what",
    "across": "aggregator",
    "value": "score_difference",
    "format": ".0e",
}


def candidates(whole: SubNetwork) -> dict[str, SubNetwork]:
    """Sub-networks that are prefixes: one for every dimension, and all of them together."""
    n, (groups, each, mlp) = len(whole.layers), vars(whole.layers[0]).values()
    few, less, narrow = max(1, groups - 1), max(1, each - 1), whole.hidden * 8 // 9
    gone = LayerShape(0, 0, 0)

    def alike(hidden: int, *shape: int, depth: int = n) -> SubNetwork:
        return SubNetwork(hidden, (LayerShape(*shape),) * depth + (gone,) * (n - depth))

    ragged = tuple(LayerShape(few if i % 2 else groups, each, mlp * (4 + i % 5) // 8) for i in range(n))
    return {
        "dense": whole,
        "two thirds of the neurons": alike(whole.hidden, groups, each, mlp * 2 // 3),
        "a query head less in each group": alike(whole.hidden, groups, less, mlp),
        "a group less": alike(whole.hidden, few, each, mlp),
        "eight ninths of the channels": alike(narrow, groups, each, mlp),
        "four fifths of the layers": alike(whole.hidden, groups, each, mlp, depth=n * 4 // 5),
        "all of these": alike(narrow, few, less, mlp * 2 // 3, depth=n * 4 // 5),
        "ragged neurons and groups": SubNetwork(whole.hidden, ragged),
    }


def arguments(sub: SubNetwork) -> dict[str, Any]:
    """A sub-network as set_sub_network takes it."""
    shapes = [s for s in sub.layers if s.mlp]

    def one(values: list[int]) -> Any:
        return values[0] if len(set(values)) == 1 else values

    return {
        "sub_network_n_embd": sub.hidden,
        "sub_network_intermediate_size": one([s.mlp for s in shapes]),
        "sub_network_num_heads": one([s.kv_heads * s.q_per_kv for s in shapes]),
        "sub_network_query_groups": one([s.kv_heads for s in shapes]),
        "sub_network_n_layers": len(shapes),
    }


def original(options: Any, tensors: dict[str, Tensor], told: dict[str, str]) -> tuple[dict[str, Tensor], Any]:
    """What run_whittle.py writes: tensors, and its metadata."""
    script = Path(__file__).with_name("run_whittle.py")
    with tempfile.TemporaryDirectory(prefix="prunus-peer-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        for file in Path(options.model).iterdir():
            (folder / "model" / file.name).symlink_to(file.resolve())
        save_file(tensors, folder / "asked", metadata=told)
        subprocess.run(
            [options.python, script, folder / "model", folder / "asked", folder / "out"], check=True, cwd=folder
        )
        with safe_open(folder / "out", framework="pt") as file:
            data = {key: json.loads(value) for key, value in file.metadata().items()}
            return {name: file.get_tensor(name) for name in file.keys()}, data  # noqa: SIM118


@torch.no_grad()
def main() -> int:
    """Ask both, compare."""
    parser = parts.parser(__doc__, samples=8, length=256)
    parser.add_argument("--python", required=True, help="the interpreter of whittle's environment")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, nargs=2, default=(2048, 5), help="tokens in a test window, windows")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="litgpt's name of the model")
    options = parser.parse_args()
    loaded = load(options.model, dtype="float32")
    model, family = loaded.model, family_of(loaded.model.config)
    length, windows = options.windows
    ids, text = parts.tokens(options, loaded), text_ids(options.text, loaded.tokenizer)
    subs = candidates(full(model.config))
    told = {
        "name": options.name,
        "objectives": json.dumps(AGGREGATORS),
        "networks": json.dumps({name: arguments(sub) for name, sub in subs.items()}),
    }
    theirs, data = original(options, {"ids": ids, "test": chunked(model, text, length, windows)}, told)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rows: list[dict[str, Any]] = []
    for name, sub in subs.items():
        found = data["networks"][name]
        own = parameters(extract(model, family, sub))["all"]
        twice = sub.hidden * model.config.vocab_size if tied else 0
        with activate(model, family, sub):
            logits = model(ids[:1], use_cache=False).logits.float()
            score = perplexity(model, text, length=length, chunks=windows)
        row: dict[str, Any] = {"kind": "network", "what": name, "parameters": own, "perplexity": score.ppl}
        row |= {key: found[key] for key in ("error", "extract_error", "extracted_difference") if key in found}
        if "nats" in found:
            row["their_perplexity"] = float(torch.tensor(found["nats"]).double().mean().exp())
            row["difference"] = float((theirs[f"logits {name}"] - logits).abs().max())
            row["their_parameters"] = found["parameters"] - twice - own
        if "extracted" in found:
            row["extracted"] = found["extracted"] - twice - own
        rows.append(row)
    rows += scored(model, family, ids, theirs, data["failed"])
    versions = data["versions"]
    note = (
        f"whittle {versions['whittle']} on litgpt {versions['litgpt']}, torch {versions['torch']}, float32. "
        f"Perplexity, first {windows} windows of {length} tokens; logits of {ids.shape[1]} calibration tokens. "
        "Counts are differences from ours."
    )
    judged = [row for row in rows if "half" in row]
    same = sum(row["kept_by_both"] == row["half"] for row in judged)
    scores = (
        f"Largest difference, of the largest score: sums over the layers, {len(ids)} windows of {ids.shape[1]} tokens "
        f"as one batch. In {same} of {len(judged)} cases the best half is the same."
    )
    views = {
        "whittle": {"where": {"kind": "network"}, "columns": COLUMNS, "note": note},
        "whittle-scores": {"where": {"kind": "score"}, **SCORES, "note": scores},
    }
    parts.write(options.results, "whittle", rows, views)
    return 0


def scored(model: Any, family: Any, ids: Tensor, theirs: dict[str, Tensor], failed: dict[str, str]) -> list[Any]:
    """A row for every score of every unit."""
    rows = []
    for aggregator in AGGREGATORS:
        own = importance.score(
            model, family, ids, "activation", aggregator, neurons="product", hidden="final", micro=len(ids)
        )
        for unit, words in UNITS.items():
            key, mine = f"{unit} {aggregator}", getattr(own, unit).double()
            mine = mine if unit == "hidden" else mine.sum(0).flatten()
            row = {"kind": "score", "what": words, "aggregator": aggregator}
            rows.append(row | (agreement(mine, theirs[key]) if key in theirs else {"error": failed[key]}))
    rows.append(
        {"kind": "score", "what": "layers", "aggregator": "1 - cosine", **agreement(own.blocks, theirs["blocks"])}
    )
    return rows


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Of two lists of scores: the largest relative difference, and what both keep of the best half."""
    half = max(1, len(ours) // 2)
    best = [set(x.argsort(descending=True, stable=True)[:half].tolist()) for x in (ours, theirs)]
    ranks = torch.stack([x.double().argsort().argsort().double() for x in (ours, theirs)])
    return {
        "score_difference": float(((ours.double() - theirs).abs() / theirs.abs().max()).max()),
        "rank_correlation": float(torch.corrcoef(ranks)[0, 1]),
        "half": half,
        "kept_by_both": len(best[0] & best[1]),
    }


if __name__ == "__main__":
    sys.exit(main())
