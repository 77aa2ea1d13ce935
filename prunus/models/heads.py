"""Floor 2: the output matrix of a language model, applied to few positions at a time, forward and backward.

Logits of a whole batch never exist: 4,096 positions of a vocabulary of 49,152 are 0.8 GB, and a loss makes several
copies of them. Each piece's gradient is taken as soon as its loss is known, and only the sums are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunus.errors import UserError

Measure = Callable[[Tensor, int], Tensor]  # (logits of a piece, its first position) -> its summed loss
PIECE = {"cpu": 2**22, "cuda": 2**27}  # numbers in the logits of one piece, of which a loss makes copies
GROUP = {"cpu": 2**26, "cuda": 2**29}  # the same of one group, for which the head's gradient is taken at once


@dataclass(frozen=True)
class Head:
    """The last module of a model with the weights that it has at the moment; a function of hidden states."""

    module: nn.Module
    weights: Mapping[str, Tensor]
    cap: float | None  # logits are kept in (-cap, cap) by a tanh (Gemma 2)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden, self.weights)

    def logits(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Logits (n, vocab) of hidden states (n, d) with other weights of the same names."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(next(iter(weights.values())).dtype)
        if type(self.module) is nn.Linear:  # without the module's hooks, which need not stand a gradient in the forward
            found = nn.functional.linear(hidden, weights["weight"], weights.get("bias"))
        else:
            found = functional_call(self.module, dict(weights), (hidden,))
        return torch.tanh(found / self.cap) * self.cap if self.cap else found

    def whole(self) -> Head:
        """The same, detached from any graph."""
        return Head(self.module, {name: w.detach() for name, w in self.weights.items()}, self.cap)


def head_of(model: Any) -> Head:
    """The head of a model as it is now: inside `activate`, the sub-network's."""
    module = model.get_output_embeddings()
    if module is None or model.base_model is model:
        raise UserError(f"{type(model).__name__} has no output matrix of its own, so it cannot be trained here")
    return Head(module, dict(module.named_parameters()), getattr(model.config, "final_logit_softcapping", None))


def summed_loss(head: Head, hidden: Tensor, measure: Measure) -> Tensor:
    """The sum of `measure` over all positions of hidden states (n, d), a scalar whose backward is ready.

    Gradients reach the hidden states and those weights of the head that want them.
    """
    vocabulary = int(max(w.shape[0] for w in head.weights.values()))
    piece = max(1, PIECE.get(hidden.device.type, PIECE["cpu"]) // vocabulary)
    if not torch.is_grad_enabled():
        parts = [measure(head(hidden[k : k + piece]), k) for k in range(0, len(hidden), piece)]
        return torch.stack(parts).sum() if parts else hidden.new_zeros((), dtype=torch.float32)

    sizes = (piece, max(piece, GROUP.get(hidden.device.type, GROUP["cpu"]) // vocabulary))
    found: Tensor = _Pieces.apply(hidden, head, measure, sizes, *head.weights.values())  # type: ignore[no-untyped-call]
    return found


class _Pieces(torch.autograd.Function):
    """A sum over pieces whose gradient is taken in the forward: logits of a group, losses of its pieces, then back."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, measure: Measure, sizes: tuple[int, int], *weights: Tensor
    ) -> Tensor:
        piece, group = sizes
        wanted = ctx.needs_input_grad[4:]
        total = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden)
        sums = [torch.zeros_like(w) if want else None for w, want in zip(weights, wanted, strict=True)]
        for start in range(0, len(hidden), group):
            with torch.enable_grad():
                h = hidden[start : start + group].detach().requires_grad_()
                own = [w.detach().requires_grad_(want) for w, want in zip(weights, wanted, strict=True)]
                logits = head.logits(h, dict(zip(head.weights, own, strict=True)))
            slopes = torch.empty_like(logits)
            for first in range(0, len(h), piece):
                with torch.enable_grad():
                    some = logits[first : first + piece].detach().requires_grad_()
                    loss = measure(some, start + first)
                slopes[first : first + piece] = torch.autograd.grad(loss, some)[0]
                total += loss.detach()
            got = torch.autograd.grad(logits, [h, *(w for w in own if w.requires_grad)], slopes)
            gradient[start : start + group] = got[0]
            for sum_, part in zip((s for s in sums if s is not None), got[1:], strict=True):
                sum_ += part
        ctx.gradient, ctx.sums = gradient, sums
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        scale = grad[0]
        own = (None if s is None else s.mul_(scale.to(s.dtype)) for s in ctx.sums)
        return ctx.gradient * scale.to(ctx.gradient.dtype), None, None, None, *own


__all__ = ["Head", "head_of", "summed_loss"]
