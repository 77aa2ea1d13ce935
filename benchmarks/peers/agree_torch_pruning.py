"""Does our LLM-Pruner judge neurons as Torch-Pruning's dependency graph does, with the same gradients?

    pip install torch-pruning
    python benchmarks/peers/agree_torch_pruning.py MODEL --calibration FILE --keep 0.8

LLM-Pruner is built on Torch-Pruning. Its graph couples gate, up and down projection of each MLP by itself; its
GroupTaylorImportance on that group, summed, must equal our importance (`param_first`; `vector` with `multivariable`),
and the neurons kept at the share must be the same ones.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import parts
import torch
import torch_pruning as tp

from prunus.baselines import llm_pruner
from prunus.baselines.subject import Subject, best, even_widths
from prunus.models.loading import load

COLUMNS = [
    ["peer", "peer", ""],
    ["score", "Taylor importance", ""],
    ["largest_relative_difference", "largest difference, of the layer's largest score", ".1e"],
    ["neurons", "neurons of a layer", "d"],
    ["kept", "kept", "d"],
    ["kept_by_both", "by both", "d"],
]


def theirs(model: Any, gradients: llm_pruner.Gradients, vector: bool) -> torch.Tensor:
    """Importance of every neuron by Torch-Pruning, (layers, neurons)."""
    judge = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None, multivariable=vector)
    rows = []
    for i, layer in enumerate(model.model.layers):
        mlp = layer.mlp.requires_grad_(True)
        for name, parameter in mlp.named_parameters():
            parameter.grad = gradients.first[f"model.layers.{i}.mlp.{name}"].to(parameter.dtype)
        x = torch.randn(1, 4, mlp.gate_proj.in_features, dtype=mlp.gate_proj.weight.dtype)
        graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=x)
        every = list(range(mlp.gate_proj.out_features))
        group = graph.get_pruning_group(mlp.gate_proj, tp.prune_linear_out_channels, idxs=every)
        rows.append(judge(group).detach())
        mlp.requires_grad_(False)
        mlp.zero_grad(set_to_none=True)
    return torch.stack(rows)


def main() -> int:
    """Compare both scores, print and write how far they agree."""
    parser = parts.parser(__doc__, samples=10, length=64)
    parser.add_argument("--keep", type=float, default=0.8)
    options = parser.parse_args()
    loaded = load(options.model, dtype="float32")
    ids = parts.tokens(options, loaded)
    subject = Subject(loaded.model, ids, gradient_windows=options.samples)
    gradients = subject.once("gradients", lambda: llm_pruner.gradients(subject))
    _, width = even_widths(subject, options.keep)
    rows = []
    for taylor in ("param_first", "vector"):
        ours = llm_pruner.importance(subject, taylor).mlp.float()
        peer = theirs(loaded.model, gradients, taylor == "vector").float()
        pairs = [(set(best(a, width).tolist()), set(best(b, width).tolist())) for a, b in zip(ours, peer, strict=True)]
        rows.append(
            {
                "peer": f"torch-pruning {version('torch-pruning')}",
                "score": taylor,
                "largest_relative_difference": float(((ours - peer).abs() / peer.abs().amax(1, keepdim=True)).max()),
                "neurons": subject.whole.layers[0].mlp,
                "kept": width,
                "kept_by_both": min(len(a & b) for a, b in pairs),
            }
        )
    note = (
        f"Gradients of {options.samples} windows of {options.length} tokens, float32; "
        f"{100 * options.keep:g} % of the blocks kept. The fewest of any layer."
    )
    parts.write(options.results, "torch-pruning", rows, {"torch-pruning": {"columns": COLUMNS, "note": note}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
