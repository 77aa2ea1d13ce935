"""Floor 3: how far a candidate is from the dense model, on fresh tokens, paying only for the layers that differ.

Candidates are judged as they will be shipped: their writers carry reformed weights (`weights`), which the callable
supplies. Candidates that share their first layers share those layers' forward: a batch is walked like a trie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prunus.models.slicing import Override, activate
from prunus.models.stream import LayerStream
from prunus.subnetwork import SubNetwork

IGNORED = -100  # the label of a token that carries no loss, as everywhere in transformers
Weights = Callable[[SubNetwork], Override]
PIECE = {"cpu": 2**24, "cuda": 2**27}  # numbers in one float32 piece of logits


def no_weights(_: SubNetwork) -> Override:
    """Candidates keep the super-network's own weights: the papers' setting."""
    return {}


def kl_from_logits(dense: Tensor, candidate: Tensor) -> Tensor:
    """KL(dense || candidate) in nats of two sets of logits (..., vocab) -> (...), computed in float32.

    Piece by piece: it takes five float32 copies of its logits, and a vocabulary of 128 k makes a window a gigabyte.
    """
    vocabulary = dense.shape[-1]
    rows = max(1, PIECE.get(dense.device.type, PIECE["cpu"]) // vocabulary)
    both = (torch.split(logits.reshape(-1, vocabulary), rows) for logits in (dense, candidate))
    return torch.cat([_kl(p.float(), q.float()) for p, q in zip(*both, strict=True)]).view(dense.shape[:-1])


def _kl(dense: Tensor, candidate: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(dense, -1), torch.log_softmax(candidate, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass
class Divergence:
    """Quality of candidates on windows drawn from pools of token windows (n, length).

    Gives one value per window, so that candidates can be compared in pairs (the `Objective` of a search).
    kind "kl": KL(dense || candidate), "ppl": negative log-likelihood of the next token; both in nats per position.
    holdout: windows for negative draws, which no search draw sees.
    labels, holdout_labels: of windows of training data (-100 where a token carries no loss): with kind "ppl", the loss
        of every labelled token, whatever the stride; a window without any counts as 0, so leave such out.
    stride: every how many positions the head is evaluated (the head is a large share of a small model).
    """

    stream: LayerStream
    pool: Tensor
    weights: Weights = no_weights
    kind: Literal["kl", "ppl"] = "kl"
    windows: tuple[int, ...] = (4, 16)  # windows evaluated at each rung
    holdout: Tensor | None = None
    labels: Tensor | None = None
    holdout_labels: Tensor | None = None
    stride: int = 4
    micro: int = 2  # windows that run together
    seed: int = 0
    forward_tokens: float = 0.0
    _dense: dict[tuple[bool, int], Tensor] = field(default_factory=dict)

    def draw(self, draw: int, rung: int) -> list[int]:
        """The windows of one draw: the same for the same (seed, draw, rung), other ones for another draw.

        Search draws walk through the pool without repeating a window until it is used up.
        """
        pool = self._pool(draw)
        n = min(self.windows[rung], len(pool))
        step = max(1, len(pool) // max(self.windows))
        lap, place = divmod(abs(draw), step)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + lap * 2 + (draw < 0))
        order = torch.randperm(len(pool), generator=generator)
        return sorted(order.roll(-place * min(max(self.windows), len(pool)))[:n].tolist())

    def n_tokens(self, rung: int) -> int:
        """Forward tokens of one candidate that shares no layer with another."""
        return min(self.windows[rung], len(self.pool)) * int(self.pool.shape[1])

    def __call__(self, subs: Sequence[SubNetwork], draw: int, rung: int) -> Iterator[list[float]]:
        yield from self._measure(subs, self.draw(draw, rung), draw < 0)

    def measure(self, subs: Sequence[SubNetwork], windows: Sequence[int], holdout: bool = False) -> list[list[float]]:
        """Mean divergence of each candidate on each of the given windows: one list per candidate."""
        order = sorted(range(len(subs)), key=lambda c: _path(subs[c]))
        found = dict(zip(order, self._measure([subs[c] for c in order], windows, holdout), strict=True))
        return [found[c] for c in range(len(subs))]

    def _pool(self, draw: int) -> Tensor:
        if draw >= 0:
            return self.pool
        if self.holdout is None:
            raise ValueError("a negative draw asks for held-out windows, but the objective was given none")
        return self.holdout

    def _measure(self, subs: Sequence[SubNetwork], windows: Sequence[int], holdout: bool) -> Iterator[list[float]]:
        """One candidate after the other; each starts where it first differs from the one before."""
        pool = self._pool(-1 if holdout else 0)
        batches = [list(windows[k : k + self.micro]) for k in range(0, len(windows), self.micro)]
        trails: list[list[Tensor]] = [[] for _ in batches]  # hidden states before each layer of the last candidate
        last: SubNetwork | None = None
        for sub in subs:
            values: list[float] = []
            weights: Override = {}  # those of the candidate before go first
            with torch.no_grad():
                weights = self.weights(sub)  # once for all windows: a large model's outgrow any cache of them
                for b, batch in enumerate(batches):
                    values += self._batch(sub, weights, last, pool[batch], batch, holdout, trails[b])
                    if len(subs) == 1:  # nobody comes after it
                        trails[b].clear()
            last = sub
            yield values

    def _batch(
        self,
        sub: SubNetwork,
        weights: Override,
        last: SubNetwork | None,
        ids: Tensor,
        batch: list[int],
        holdout: bool,
        trail: list[Tensor],
    ) -> list[float]:
        reference = self._reference(batch, ids, holdout)
        shared = _shared_layers(last, sub) if last is not None else 0
        with activate(self.stream.model, self.stream.family, sub, weights):
            if last is None or last.hidden != sub.hidden:
                trail[:] = [self.stream.embed(ids)]
            del trail[shared + 1 :]
            for i in range(len(trail) - 1, len(self.stream)):
                trail.append(self.stream.run(i, trail[-1]))
                self.forward_tokens += ids.numel() / len(self.stream)
            labels = self.holdout_labels if holdout else self.labels
            if labels is not None:
                return [self._loss(h, row) for h, row in zip(trail[-1], labels[batch], strict=True)]
            return self._values(trail[-1], reference, ids)

    def _positions(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.stride - 1 : -1 : self.stride]

    def _reference(self, batch: list[int], ids: Tensor, holdout: bool) -> Tensor | None:
        """Dense logits at the measured positions; the dense model runs once per window in all."""
        if self.kind == "ppl":
            return None
        new = [k for k, w in enumerate(batch) if (holdout, w) not in self._dense]
        if new:
            hidden = self.stream.run_from(0, self.stream.embed(ids[new]))
            self.forward_tokens += ids[new].numel()
            for k, h in zip(new, self._positions(hidden), strict=True):
                self._dense[holdout, batch[k]] = h.clone()
        return self.stream.logits(torch.stack([self._dense[holdout, w] for w in batch]))

    def _loss(self, hidden: Tensor, labels: Tensor) -> float:
        """Cross entropy of the labelled tokens of one window, nats per token."""
        targets = labels[1:].to(hidden.device)
        carries = targets != IGNORED
        if not carries.any():
            return 0.0
        logits = self.stream.logits(hidden[:-1][carries])
        return float(torch.nn.functional.cross_entropy(logits.float(), targets[carries]))

    def _values(self, hidden: Tensor, reference: Tensor | None, ids: Tensor) -> list[float]:
        logits = self.stream.logits(self._positions(hidden))
        if reference is not None:
            return [float(kl_from_logits(p, q).mean()) for p, q in zip(reference, logits, strict=True)]
        targets = ids[:, self.stride :: self.stride][:, : logits.shape[1]].to(logits.device)
        return [
            float(torch.nn.functional.cross_entropy(row.float(), target))
            for row, target in zip(logits, targets, strict=True)
        ]


def _path(sub: SubNetwork) -> tuple[object, ...]:
    kept = [repr(k) for k in sub.kept] or [""] * len(sub.layers)
    return (sub.hidden, *((s.kv_heads, s.q_per_kv, s.mlp, k) for s, k in zip(sub.layers, kept, strict=True)))


def _shared_layers(a: SubNetwork, b: SubNetwork) -> int:
    """How many first layers two sub-networks have in common (0 if their hidden sizes differ)."""
    if a.hidden != b.hidden:
        return 0
    first, second = _path(a)[1:], _path(b)[1:]
    return next((i for i, (x, y) in enumerate(zip(first, second, strict=True)) if x != y), len(first))
