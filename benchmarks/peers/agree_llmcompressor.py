"""Do our masks of Wanda and SparseGPT equal those of llm-compressor's modifiers, on the same tokens?

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0
    echo torch==2.13.0 > pins.txt
    PEER/bin/pip install llmcompressor -c pins.txt
    python benchmarks/peers/agree_llmcompressor.py MODEL --python PEER/bin/python --calibration FILE --text FILE

llm-compressor wants an older transformers than ours, so its modifiers run in an environment of their own
(run_llmcompressor.py) and hand over their matrices, which are then scored here beside ours. MODEL is a directory.
Each layer reads what the pruned ones before it give, so one tie that is broken the other way changes all that follows:
the first layer shows what the method decides on the same inputs, and, of the methods of --float64, a third network,
ours in that precision, what rounding alone does.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import parts
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunus.baselines.mask_magnitude import matrices
from prunus.baselines.subject import Subject
from prunus.baselines.table import find
from prunus.evaluation import perplexity, text_ids
from prunus.models.loading import load

METHODS = {
    "mask-wanda": ("wanda", "0:0"),
    "mask-wanda-2:4": ("wanda", "2:4"),
    "mask-sparsegpt": ("sparsegpt", "0:0"),
    "mask-sparsegpt-2:4": ("sparsegpt", "2:4"),
}
COLUMNS = [
    ["method", "method", ""],
    ["who", "whose", ""],
    ["perplexity", "perplexity", ".2f"],
    ["log_difference", "ln of it against ours", "+.2%"],
    ["zeros", "zeros", ".3%"],
    ["agree", "positions of the mask as in ours", ".2%"],
    ["agree_first", "in the first layer", ".4%"],
    ["agree_last", "in the last", ".2%"],
    ["alike", "layers from the first with the same mask", "d"],
    ["weights", "weights of the first layer, relative distance", ".2g"],
]


def share(subject: Subject, sparsity: float) -> float:
    """The share of the blocks to ask for, so that exactly `sparsity` of the matrices' weights leave."""
    inside = sum(weight.numel() for _, weight in matrices(subject.model, subject.family))
    return (subject.blocks - sparsity * inside) / subject.blocks


def own(subject: Subject, method: str, sparsity: float) -> tuple[Any, float]:
    """Our network and its seconds."""
    keep = share(subject, sparsity) if METHODS[method][1] == "0:0" else 0.5
    outcome, spent = subject.run(lambda: find(method).run(subject, keep))
    return outcome.model, spent.seconds


def blocks(model: Any) -> dict[str, Tensor]:
    """A copy of the matrices of the decoder blocks, by name."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.ndim == 2 and ".layers." in name}


def original(options: Any, ids: Tensor, method: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """llm-compressor's matrices by name, and its versions and seconds."""
    modifier, structure = METHODS[method]
    script = Path(__file__).with_name("run_llmcompressor.py")
    with tempfile.TemporaryDirectory(prefix="prunus-peer-") as folder:
        given, made = f"{folder}/tokens.safetensors", f"{folder}/matrices.safetensors"
        save_file({"ids": ids}, given)
        asked = [options.python, script, options.model, given, made, "--modifier", modifier, "--structure", structure]
        subprocess.run([*asked, "--sparsity", str(options.sparsity)], check=True, cwd=folder)
        with safe_open(made, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def compared(theirs: dict[str, Tensor], ours: dict[str, Tensor], layers: int) -> dict[str, Any]:
    """How far two sets of matrices agree."""
    equal = {name: ((w == 0) == (ours[name] == 0)) for name, w in theirs.items()}

    def agreed(part: str) -> float:
        some = [e for name, e in equal.items() if part in name]
        return sum(int(e.sum()) for e in some) / sum(e.numel() for e in some)

    same = [all(bool(e.all()) for name, e in equal.items() if f".layers.{i}." in name) for i in range(layers)]
    first = [name for name in theirs if ".layers.0." in name]
    apart = sum(float((theirs[name] - ours[name]).double().square().sum()) for name in first)
    size = sum(float(ours[name].double().square().sum()) for name in first)
    return {
        "agree": agreed(""),
        "agree_first": agreed(".layers.0."),
        "agree_last": agreed(f".layers.{layers - 1}."),
        "alike": (*same, False).index(False),
        "weights": (apart / size) ** 0.5,
    }


def main() -> int:
    """Prune with both, score both, compare."""
    parser = parts.parser(__doc__, samples=32, length=256)
    parser.add_argument("--python", required=True, help="the interpreter of llm-compressor's environment")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, nargs=2, default=(2048, 5), help="tokens in a test window, windows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--float64", nargs="*", choices=METHODS, default=["mask-wanda"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    options = parser.parse_args()
    options.model = str(Path(options.model).resolve())
    loaded = load(options.model, dtype="float32")
    ids, test = parts.tokens(options, loaded), text_ids(options.text, loaded.tokenizer)
    subject = Subject(loaded.model, ids)
    length, windows = options.windows

    rows: list[dict[str, Any]] = []
    dense = perplexity(loaded.model, test, length=length, chunks=windows)
    for method in options.methods:
        model, took = own(subject, method, options.sparsity)
        theirs, told = original(options, ids, method)
        ours = blocks(model)
        networks = {
            "ours": (ours, took),
            f"llm-compressor {told['llmcompressor']}": (theirs, float(told["seconds"])),
        }
        if method in options.float64:
            wide = replace(subject, model=copy.deepcopy(loaded.model).double())
            again, seconds = own(wide, method, options.sparsity)
            networks["ours, in float64"] = blocks(again.float()), seconds
        nats = None
        for who, (found, seconds) in networks.items():
            with torch.no_grad():
                for name, weight in found.items():
                    model.get_parameter(name).copy_(weight)
            score = perplexity(model, test, length=length, chunks=windows)
            zeros = sum(int((w == 0).sum()) for w in found.values()) / sum(w.numel() for w in found.values())
            row: dict[str, Any] = {"method": method, "who": who, "perplexity": score.ppl, "nats": score.nats}
            row |= {"zeros": zeros, "seconds": seconds}
            if nats is not None:
                row |= {"log_difference": score.nats / nats - 1, **compared(found, ours, len(subject.stream))}
            nats = nats or score.nats
            rows.append(row)
        note = (
            f"llm-compressor ran with torch {told['torch']} and transformers {told['transformers']}. "
            f"{100 * options.sparsity:g} % of the matrices' weights leave, calibrated on {options.samples} windows of "
            f"{options.length} tokens, float32. Perplexity, first {windows} windows of {length} tokens; "
            f"dense: {dense.ppl:.2f}."
        )
        parts.write(options.results, "llm-compressor", rows, {"llm-compressor": {"columns": COLUMNS, "note": note}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
