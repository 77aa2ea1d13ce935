"""Floor 3: SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024): the residual stream keeps its principal directions.

Before each sub-layer the stream is rotated into the eigenvectors of its second moments (plus 1 % of their mean on the
diagonal, as the released code has it) and its least directions are cut. A rotated RMS norm without weights is the same
function, so the rotations go into the matrices that read and write the stream, and the change from one rotation to the
next becomes a shortcut matrix beside each sub-layer, Q_before^T Q_after, which is counted. Each rotation is computed on
what the layers that are cut already produce. As in the released code the last MLP's output and the head are not cut.

Not taken over: the released code subtracts the mean of each embedding, which only a layer norm would undo.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.baselines.subject import Outcome, Subject, largest
from prunus.errors import UserError
from prunus.models import sliced
from prunus.models.memory import give_back
from prunus.models.ragged import NoMLP
from prunus.models.stream import LayerStream
from prunus.scoring.moments import add_products
from prunus.subnetwork import SubNetwork

DAMPING = 0.01  # of the mean of the diagonal; moves no eigenvector


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
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    new, _, causal = sliced.CLASSES[f"prunus_sliced_{config.model_type}"]
    small = new(**{**kept, "head_dim": head_dim, "tie_word_embeddings": False, "sliced_size": size})
    small._attn_implementation = config._attn_implementation
    return causal._from_config(small, dtype=dtype).eval()  # type: ignore[attr-defined]


def parameters(config: Any, size: int) -> int:
    """Parameters inside the layers of a network of `size` directions."""
    with torch.device("meta"):
        model = blank(config, size, torch.float32)
    return sum(p.numel() for p in model.base_model.layers.parameters())


@torch.no_grad()
def rotated(subject: Subject, size: int) -> nn.Module:
    """The network with the dense model's weights, rotated and cut, layer after layer."""
    dense, stream = subject.model, LayerStream(subject.copy(), subject.family)
    small = blank(dense.config, size, next(dense.parameters()).dtype).to(subject.device)
    batches = list(torch.split(subject.ids, subject.micro))
    carried = [stream.embed(batch) for batch in batches]
    before = directions(carried, size)
    _set(small.base_model.embed_tokens.weight, dense.get_input_embeddings().weight.double() @ before)
    small.base_model.norm.load_state_dict(dense.base_model.norm.state_dict())
    _set(small.lm_head.weight, dense.get_output_embeddings().weight)
    n, tokens = len(stream), subject.ids.numel()
    with subject.progress("rotations", n * tokens) as advance:
        for i, module in enumerate(stream.layers):
            layer: Any = module
            mlp, layer.mlp = layer.mlp, NoMLP()
            middle = [stream.run(i, projected(hidden, before)) for hidden in carried]
            layer.mlp = mlp
            inside = directions(middle, size)
            for b, hidden in enumerate(middle):
                flat = projected(hidden, inside)
                carried[b] = flat + mlp(layer.post_attention_layernorm(flat))
                advance(batches[b].numel())
            after = None if i == n - 1 else directions(carried, size)
            _fill(small.base_model.layers[i], layer, before, inside, after)
            before = inside if after is None else after
            give_back()
    subject.count(tokens)
    return small  # type: ignore[no-any-return]


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


def _fill(new: Any, layer: Any, before: Tensor, inside: Tensor, after: Tensor | None) -> None:
    """The matrices of one layer; after: None where its output is whole and not rotated."""
    for reader in (layer.self_attn, layer.mlp):
        norm, basis = (
            (layer.input_layernorm, before) if reader is layer.self_attn else (layer.post_attention_layernorm, inside)
        )
        twin = new.self_attn if reader is layer.self_attn else new.mlp
        for name, module in reader.named_modules():
            own: Any = twin.get_submodule(name)
            if isinstance(module, nn.Linear) and name not in ("o_proj", "down_proj"):
                _set(own.weight, module.weight.double() * norm.weight.double() @ basis)
                if module.bias is not None:
                    _set(own.bias, module.bias)
            elif not isinstance(module, nn.Linear):
                for key, p in module.named_parameters(recurse=False):  # norms of single heads
                    _set(getattr(own, key), p)
    _write(new.self_attn.o_proj, layer.self_attn.o_proj, inside)
    _write(new.mlp.down_proj, layer.mlp.down_proj, after)
    _set(new.attention_shortcut.weight, (before.T @ inside).T)
    _set(new.mlp_shortcut.weight, inside if after is None else (inside.T @ after).T)


def _write(new: nn.Linear, old: nn.Linear, basis: Tensor | None) -> None:
    weight, bias = old.weight.double(), None if old.bias is None else old.bias.double()
    _set(new.weight, weight if basis is None else basis.T @ weight)
    if bias is not None:
        _set(new.bias, bias if basis is None else basis.T @ bias)


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value.to(parameter.dtype))
