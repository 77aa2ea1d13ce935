"""Floor 3: SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024): the residual stream keeps its principal directions.

Before each sub-layer the stream is rotated into the eigenvectors of its second moments (plus 1 % of their mean on the
diagonal, as the released code has it) and its least directions are cut. A rotated RMS norm without weights is the same
function, so the rotations go into the matrices that read and write the stream, and the change from one rotation to the
next becomes a shortcut matrix beside each sub-layer, Q_before^T Q_after, which is counted. Attention and MLP that read
the same stream share one. Each rotation is computed on what the layers that are cut already produce. As in the released
code the last MLP's output and the head are not cut.

A layer norm is an RMS norm after the mean is subtracted (their section 3.1): what writes the stream (embeddings, and
the writers with their biases) writes it without its mean, weights and biases of the norms go into the matrices behind.
The released code subtracts the embeddings' mean in every family; here only a layer norm's, which would undo it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunus.baselines.subject import Outcome, Subject, largest
from prunus.errors import UserError
from prunus.models import sliced
from prunus.models.families import Family, family_of
from prunus.models.memory import give_back
from prunus.models.ragged import NoAttention, NoMLP
from prunus.models.slicing import layers_of
from prunus.models.stream import LayerStream
from prunus.scoring.moments import add_products, writer_weight
from prunus.subnetwork import SubNetwork

DAMPING = 0.01  # of the mean of the diagonal; moves no eigenvector
BIASES = {"opt": "enable_bias", "gpt_neox": "attention_bias"}  # readers need one, for the layer norms' biases


def compress(subject: Subject, keep: float) -> Outcome:
    """As many directions as the budget has room for, shortcut matrices counted."""
    size = largest(lambda k: parameters(subject.model.config, k) <= subject.budget(keep), subject.whole.hidden - 1)
    if size is None:
        raise UserError(f"cannot keep {keep:g}: not one direction of the residual stream would be left; keep more")
    small = rotated(subject, size)
    note = f"{size} of {subject.whole.hidden} directions; embedding and output matrix are no longer shared"
    return Outcome(small, SubNetwork(size, subject.whole.layers), (note,))


def blank(config: Any, size: int, dtype: torch.dtype) -> Any:
    """An empty network of `size` directions, in evaluation mode."""
    identity = ("model_type", "architectures", "transformers_version")
    kept = {k: v for k, v in config.to_dict().items() if k not in identity}
    kept |= {BIASES[config.model_type]: True} if config.model_type in BIASES else {}
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    new, _, causal = sliced.CLASSES[f"prunus_sliced_{config.model_type}"]
    small = new(**{**kept, "head_dim": head_dim, "tie_word_embeddings": False, "sliced_size": size})
    small._attn_implementation = config._attn_implementation
    return causal._from_config(small, dtype=dtype).eval()  # type: ignore[attr-defined]


def parameters(config: Any, size: int) -> int:
    """Parameters inside the layers of a network of `size` directions."""
    with torch.device("meta"):
        model = blank(config, size, torch.float32)
    return sum(p.numel() for p in layers_of(model, family_of(config)).parameters())


@torch.no_grad()
def rotated(subject: Subject, size: int) -> nn.Module:
    """The network with the dense model's weights, rotated and cut, layer after layer."""
    dense, family, own = subject.model, subject.family, subject.copy()
    if isinstance(dense.get_submodule(family.final_norm), nn.LayerNorm):
        centre(own, family)
    stream = LayerStream(own, family)
    small = blank(dense.config, size, next(dense.parameters()).dtype).to(subject.device)
    batches = list(torch.split(subject.ids, subject.micro))
    carried = [stream.embed(batch) for batch in batches]
    before = directions(carried, size)
    for path, row in family.outer.items():
        if row.endswith("-> hidden"):
            _set(small.get_submodule(path).weight, own.get_submodule(path).weight.double() @ before)
    small.get_submodule(family.final_norm).load_state_dict(dense.get_submodule(family.final_norm).state_dict())
    small.get_output_embeddings().load_state_dict(dense.get_output_embeddings().state_dict())
    n, tokens = len(stream), subject.ids.numel()
    *first, last = family.mlp_modules
    with subject.progress("rotations", n * tokens) as advance:
        for i, (layer, new) in enumerate(zip(stream.layers, layers_of(small, family), strict=True)):
            inside = before
            if not new.parallel:
                with _replaced(layer, {**{path: nn.Identity() for path in first}, last: NoMLP()}):
                    carried = [stream.run(i, projected(hidden, before)) for hidden in carried]
                inside = directions(carried, size)
            with _replaced(layer, {} if new.parallel else {family.attention_module: NoAttention(i)}):
                for b, hidden in enumerate(carried):
                    carried[b] = stream.run(i, projected(hidden, inside))
                    advance(batches[b].numel())
            after = None if i == n - 1 else directions(carried, size)
            _fill(new, layer, family, before, inside, after)
            before = inside if after is None else after
            give_back()
    subject.count(tokens)
    return small  # type: ignore[no-any-return]


@torch.no_grad()
def centre(model: nn.Module, family: Family) -> None:
    """Subtract its mean over channels from all that is written into the residual stream (**in place**).

    Layer norms do not see that mean, so the function is the same (an output matrix that is tied is not: leave it).
    """
    for path, row in family.outer.items():
        if row.endswith("-> hidden"):
            table: Any = model.get_submodule(path)
            _set(table.weight, table.weight.double() - table.weight.double().mean(1, keepdim=True))
    for layer in layers_of(model, family):
        for path in (family.attention_writer, family.mlp_writer):
            weight, bias = writer_weight(layer, path), layer.get_submodule(path).bias
            _set(weight, weight.double() - weight.double().mean(0, keepdim=True))
            if isinstance(bias, Tensor):
                _set(bias, bias.double() - bias.double().mean())


@contextmanager
def _replaced(layer: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Inside the block other modules stand in a layer."""
    old = {path: layer.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            layer.set_submodule(path, module)
        yield
    finally:
        for path, module in old.items():
            layer.set_submodule(path, module)


def directions(states: list[Tensor], size: int) -> Tensor:
    """The eigenvectors of the largest second moments of hidden states [(..., hidden)], (hidden, size) float64."""
    n = states[0].shape[-1]
    gram = torch.zeros(n, n, dtype=torch.float32, device=states[0].device)
    for one in states:
        flat = one.flatten(0, -2)
        add_products(gram, flat, flat)
    g = gram.double()
    g.diagonal().add_(DAMPING * g.diagonal().mean())
    return torch.linalg.eigh(g).eigenvectors[:, -size:].flip(1)  # type: ignore[no-any-return]


def projected(hidden: Tensor, basis: Tensor) -> Tensor:
    """Hidden states with nothing left outside the directions: what the cut network carries, seen from outside."""
    b = basis.to(hidden.dtype)
    return hidden @ b @ b.T


def _fill(new: Any, layer: Any, family: Family, before: Tensor, inside: Tensor, after: Tensor | None) -> None:
    """The matrices of one layer; after: None where its output is whole and not rotated."""
    there = dict(layer.named_modules())
    shared = [path for path, row in family.block.items() if row == "hidden"]
    for rows, basis in ((family.attention, before), (family.mlp, inside)):
        norm = layer.get_submodule(next((path for path, row in rows.items() if row == "hidden"), *shared))
        for path, row in rows.items():
            if row.startswith("hidden ->"):
                _read(new.get_submodule(path), layer.get_submodule(path), norm, basis)
            elif row != "hidden" and "->" not in row and path in there:  # norms of single heads
                new.get_submodule(path).load_state_dict(layer.get_submodule(path).state_dict())
    _write(new, layer, family.attention_writer, after if new.parallel else inside)
    _write(new, layer, family.mlp_writer, after)
    if not new.parallel:
        _set(new.attention_shortcut.weight, (before.T @ inside).T)
    _set(new.mlp_shortcut.weight, inside if after is None else (inside.T @ after).T)


def _read(new: Any, old: Any, norm: Any, basis: Tensor) -> None:
    """A matrix that reads the stream, with the weights and the bias of the norm before it."""
    weight = old.weight.double() if isinstance(old, nn.Linear) else old.weight.double().T
    bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device) if old.bias is None else old.bias.double()
    if getattr(norm, "bias", None) is not None:
        bias = bias + weight @ norm.bias.double()
    scaled = weight if norm.weight is None else weight * norm.weight.double()
    _place(new, scaled @ basis, bias)


def _write(new: nn.Module, layer: nn.Module, path: str, basis: Tensor | None) -> None:
    weight, old = writer_weight(layer, path).double(), layer.get_submodule(path).bias
    bias = old.double() if isinstance(old, Tensor) else weight.new_zeros(len(weight))
    _place(new.get_submodule(path), *((weight, bias) if basis is None else (basis.T @ weight, basis.T @ bias)))


def _place(module: Any, weight: Tensor, bias: Tensor) -> None:
    """Put a matrix (out, in) and its bias into a module."""
    _set(module.weight, weight if isinstance(module, nn.Linear) else weight.T)
    if module.bias is not None:
        _set(module.bias, bias)
    else:
        assert not bool(bias.any()), "a norm's bias needs a bias behind it: see BIASES"


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value.to(parameter.dtype))
