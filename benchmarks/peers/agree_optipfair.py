"""Does our ShortGPT judge layers as optipfair does, on the same tokens? And how good are optipfair's own neurons?

    pip install optipfair
    python benchmarks/peers/agree_optipfair.py MODEL --calibration FILE --text FILE --keep 0.8 [--json FILE]

optipfair's analyze_layer_importance is 1 - the mean cosine of a layer's input and output over tokens: block influence.
Its prune_model cuts the neurons of gated MLPs by the peak-to-peak magnitude of their weights, which is none of our
rivals; its perplexity is taken at the width that leaves the same share of the blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import optipfair

from prunus.baselines.shortgpt import influence
from prunus.baselines.subject import Subject, leavers
from prunus.evaluation import parameters, perplexity, text_ids
from prunus.machine import environment, words
from prunus.models import costs
from prunus.models.loading import load
from prunus.subnetwork import LayerShape, SubNetwork
from prunus.texts.calibration import calibration_tokens


def main() -> int:
    """Compare the scores, measure the other's network, print and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, nargs=2, default=(2048, 5), help="tokens in a test window, windows")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = load(options.model, dtype="float32")
    ids = calibration_tokens(
        options.calibration,
        loaded.tokenizer,
        samples=options.samples,
        length=options.length,
        seed=0,
        model=loaded.model,
    )
    subject = Subject(loaded.model, ids)
    ours = influence(subject)
    batches = [{"input_ids": window} for window in ids.split(1)]
    theirs = optipfair.analyze_layer_importance(loaded.model, batches, show_progress=False)
    n = leavers(subject, options.keep)
    layers = range(len(ours))
    least = {"ours": sorted(layers, key=lambda i: ours[i])[:n], "theirs": sorted(layers, key=lambda i: theirs[i])[:n]}
    whole = subject.whole.layers[0]

    def cost(width: int) -> int:
        shape = LayerShape(whole.kv_heads, whole.q_per_kv, width)
        return costs.parameters(subject.layout, SubNetwork(subject.whole.hidden, (shape,) * len(ours)))

    width = max(w for w in range(1, whole.mlp + 1) if cost(w) <= subject.budget(options.keep))
    small = optipfair.prune_model(
        loaded.model,
        pruning_percentage=100 * (1 - width / whole.mlp),
        neuron_selection_method="MAW",
        show_progress=False,
    )
    length, windows = options.windows
    score = perplexity(small, text_ids(options.text, loaded.tokenizer), length=length, chunks=windows)
    found = {
        "peer": f"optipfair {optipfair.__version__}",
        "largest_difference": max(abs(float(ours[i]) - theirs[i]) for i in theirs),
        "least_important": least,
        "pruned": {
            "width": small.config.intermediate_size,
            "blocks": parameters(small)["blocks"],
            "perplexity": score.ppl,
        },
        "machine": words(),
        "versions": environment(),
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
