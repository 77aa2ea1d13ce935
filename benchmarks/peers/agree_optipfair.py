"""Does our ShortGPT judge layers as optipfair does, on the same tokens? And how good are optipfair's own neurons?

    pip install optipfair
    python benchmarks/peers/agree_optipfair.py MODEL --calibration FILE --text FILE --keep 0.8

optipfair's analyze_layer_importance is 1 - the mean cosine of a layer's input and output over tokens: block influence.
Its prune_model cuts the neurons of gated MLPs by the peak-to-peak magnitude of their weights, which is none of our
rivals; its perplexity is taken at the width that leaves the same share of the blocks.
"""

from __future__ import annotations

import sys
from typing import Any

import optipfair
import parts

from prunus.baselines.shortgpt import influence
from prunus.baselines.subject import Subject, largest, leavers
from prunus.baselines.table import find
from prunus.evaluation import parameters, perplexity, text_ids
from prunus.models import costs
from prunus.models.loading import load
from prunus.subnetwork import LayerShape, SubNetwork

COLUMNS = [
    ["peer", "peer", ""],
    ["largest_difference", "largest difference of a layer's influence", ".1e"],
    ["largest", "largest influence", ".2f"],
    ["dropped", "layers that leave", "d"],
    ["dropped_by_both", "by both", "d"],
]
NETWORKS = [
    ["what", "method", ""],
    ["kept", "kept of the blocks", ".1%"],
    ["perplexity", "perplexity", ".2f"],
]


def made(model: Any, subject: Subject, keep: float) -> dict[str, Any]:
    """Two networks of ours and optipfair's, which changes the model itself (**in place**)."""
    networks: dict[str, Any] = {
        f"{name}, ours": find(name).run(subject, keep).model for name in ("magnitude", "shortgpt")
    }
    whole, n = subject.whole.layers[0], len(subject.whole.layers)

    def fits(width: int) -> bool:
        shape = LayerShape(whole.kv_heads, whole.q_per_kv, width)
        sub = SubNetwork(subject.whole.hidden, (shape,) * n)
        return costs.parameters(subject.layout, sub) <= subject.budget(keep)

    width = largest(fits, whole.mlp)
    assert width is not None
    networks["MAW, optipfair's"] = optipfair.prune_model(
        model,
        pruning_percentage=100 * (1 - width / whole.mlp),
        neuron_selection_method="MAW",
        show_progress=False,
    )
    return networks


def main() -> int:
    """Compare the scores, measure the other's network, print and write both."""
    parser = parts.parser(__doc__, samples=8, length=1024)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, nargs=2, default=(2048, 5), help="tokens in a test window, windows")
    parser.add_argument("--keep", type=float, default=0.8)
    options = parser.parse_args()
    loaded = load(options.model, dtype="float32")
    ids = parts.tokens(options, loaded)
    subject = Subject(loaded.model, ids)
    ours = influence(subject)
    batches = [{"input_ids": window} for window in ids.split(1)]
    theirs = optipfair.analyze_layer_importance(loaded.model, batches, show_progress=False)
    n = leavers(subject, options.keep)
    layers = range(len(ours))
    least = {"ours": sorted(layers, key=lambda i: ours[i])[:n], "theirs": sorted(layers, key=lambda i: theirs[i])[:n]}
    networks = made(loaded.model, subject, options.keep)
    length, windows = options.windows
    text = text_ids(options.text, loaded.tokenizer)
    rows = [
        {
            "kind": "score",
            "peer": f"optipfair {optipfair.__version__}",
            "largest_difference": max(abs(float(ours[i]) - theirs[i]) for i in theirs),
            "largest": max(theirs.values()),
            "dropped": n,
            "dropped_by_both": len(set(least["ours"]) & set(least["theirs"])),
            "least_important": least,
        },
        *(
            {
                "kind": "network",
                "what": name,
                "kept": parameters(network)["blocks"] / subject.blocks,
                "perplexity": perplexity(network, text, length=length, chunks=windows).ppl,
            }
            for name, network in networks.items()
        ),
    ]
    note = f"ShortGPT's block influence, {options.samples} windows of {options.length} tokens, float32."
    shown = f"Perplexity, first {windows} windows of {length} tokens; calibrated as above where a method is."
    views = {
        "optipfair": {"where": {"kind": "score"}, "columns": COLUMNS, "note": note},
        "optipfair-networks": {"where": {"kind": "network"}, "columns": NETWORKS, "note": shown},
    }
    parts.write(options.results, "optipfair", rows, views)
    return 0


if __name__ == "__main__":
    sys.exit(main())
