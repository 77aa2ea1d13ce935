"""Floor 3: what the calibration tokens say about every writer: Gram matrices of its inputs, Fisher of its outputs.

Streams layer by layer: the hidden states of all tokens travel, and only one layer's Grams live at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.models.families import Family
from prunus.models.memory import give_back
from prunus.models.slicing import layers_of
from prunus.models.stream import LayerStream, inputs_of

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Grams:
    """Second moments of one layer's writer inputs, float32: X^T X / tokens.

    Where a writer has a bias, its Gram is centred, (X - mean)^T (X - mean) / tokens, because the bias can take over the
    mean of what goes; where it has none, the mean is given as zero.
    """

    attention: Tensor  # (query heads * head_dim,) squared
    mlp: Tensor  # (neurons,) squared
    attention_mean: Tensor
    mlp_mean: Tensor


@contextmanager
def exact_products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 matmuls round their *inputs* to bfloat16 where these are bfloat16 numbers anyway: exact, and faster.

    Products of two bfloat16 numbers are exact in the float32 accumulator, so nothing is lost.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or settings is None:
        yield
        return
    old, cuda = settings.fp32_precision, torch.backends.cuda.matmul.allow_tf32
    settings.fp32_precision = "bf16"
    torch.backends.cuda.matmul.allow_tf32 = True  # tf32 keeps 10 bits of mantissa, bfloat16 has 7
    try:
        yield
    finally:
        settings.fp32_precision = old
        torch.backends.cuda.matmul.allow_tf32 = cuda


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, **in place**: left (tokens, m), right (tokens, n), total (m, n) float32."""
    with exact_products_of(left.dtype if left.dtype == right.dtype else torch.float32):
        total.addmm_(left.float().T, right.float())


@torch.no_grad()
def collect(
    stream: LayerStream,
    ids: Tensor,
    use: Callable[[int, Grams], None],
    *,
    openings: Tensor | None = None,
    micro: int = 4,
    advance: Advance | None = None,
) -> None:
    """Pass the calibration windows (n, length) through the dense model and hand every layer's Grams to `use`.

    openings (m, 1): tokens that a text may begin with (`calibration.openings`), which count as further tokens.
    """
    family = stream.family
    batches = [*torch.split(ids, micro), *([] if openings is None else [openings])]
    tokens = sum(batch.numel() for batch in batches)
    carried = [stream.embed(batch) for batch in batches]
    paths = (family.attention_writer, family.mlp_writer)
    for i in range(len(stream)):
        widths = [_inputs(stream.layers[i].get_submodule(path)) for path in paths]
        grams = [torch.zeros(n, n, device=stream.device) for n in widths]
        means = [torch.zeros(n, device=stream.device) for n in widths]
        biased = [stream.layers[i].get_submodule(path).bias is not None for path in paths]
        for b, batch in enumerate(batches):
            with inputs_of(stream.layers[i], *paths) as seen:
                carried[b] = stream.run(i, carried[b])
            for gram, mean, path, has_bias in zip(grams, means, paths, biased, strict=True):
                x = seen[path].flatten(0, -2)
                add_products(gram, x, x)
                if has_bias:
                    mean += x.sum(0, dtype=torch.float32)
            if advance:
                advance(batch.numel())
        for gram, mean in zip(grams, means, strict=True):
            gram /= tokens
            mean /= tokens
            gram -= torch.outer(mean, mean)
        use(i, Grams(*grams, *means))
        give_back()


def _inputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0])


def writer_weight(layer: nn.Module, path: str) -> Tensor:
    """The weight of a writer as (out, in), whatever its storage order; a view."""
    module = layer.get_submodule(path)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def stored(layer: nn.Module, path: str, weight: Tensor) -> Tensor:
    """A writer's weight (out, in) in the storage order and dtype of the module: what `activate` takes as override."""
    module = layer.get_submodule(path)
    own = module.weight
    assert isinstance(own, Tensor)
    return (weight if isinstance(module, nn.Linear) else weight.T).to(own.dtype).contiguous()


def fisher(
    model: nn.Module, family: Family, ids: Tensor, *, seed: int = 0, micro: int = 1, advance: Advance | None = None
) -> tuple[Tensor, Tensor]:
    """Second moment E[g g^T] of the loss gradient at every writer's output, (layers, hidden, hidden) each, float32.

    The loss is the cross entropy of labels drawn from the model itself (the true Fisher), one backward per window;
    weights get no gradient. Returns (attention, mlp).
    """
    layers = layers_of(model, family)
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    paths = (family.attention_writer, family.mlp_writer)
    totals = [torch.zeros(len(layers), hidden, hidden, device=ids.device) for _ in paths]
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    with _only_activations(model, family):
        hooks = []
        for i, layer in enumerate(layers):
            for total, path in zip(totals, paths, strict=True):

                def catch(_: nn.Module, __: object, grads: tuple[Tensor, ...], total: Tensor = total[i]) -> None:
                    g = grads[0].detach().flatten(0, -2)
                    add_products(total, g, g)

                hooks.append(layer.get_submodule(path).register_full_backward_hook(catch))
        try:
            for batch in torch.split(ids, micro):
                with torch.enable_grad():
                    logits = model(input_ids=batch, use_cache=False).logits.flatten(0, 1)
                    with torch.no_grad():
                        labels = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
                    nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
                if advance:
                    advance(batch.numel())
        finally:
            for hook in hooks:
                hook.remove()
    for total in totals:
        total /= ids.numel()
    return totals[0], totals[1]


@contextmanager
def _only_activations(model: nn.Module, family: Family) -> Iterator[None]:
    """Gradients flow through activations only; the embeddings' output starts them."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)

    def start(_: nn.Module, __: object, out: Tensor) -> Tensor:
        return out.requires_grad_(True)

    hook = model.get_submodule(family.embedding).register_forward_hook(start)
    try:
        yield
    finally:
        hook.remove()
        for p, flag in flags:
            p.requires_grad_(flag)


def square_root(second_moment: Tensor, shrinkage: float) -> Tensor:
    """R with R^T R = (1 - s) F + s mean(diag F) I, so that ||R e||^2 weighs an output error e by its effect.

    `shrinkage` s in (0, 1]: towards the identity, as Ledoit and Wolf (2004) shrink a covariance of few samples; the
    trace stays. What F says of other texts than the ones it was taken from is less than what it says of them.
    """
    f = second_moment.double()
    ridge = shrinkage * f.diagonal().mean() + torch.finfo(torch.float32).tiny
    f = (1 - shrinkage) * f
    f.diagonal().add_(ridge)
    root: Tensor = torch.linalg.cholesky(f).T.float().contiguous()
    return root
