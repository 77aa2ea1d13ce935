"""Floor 3: structured magnitude pruning, as FLAP's authors run it as a control (An et al. 2023, arXiv:2312.11983).

A column of a writer (what it reads from one neuron or one dimension of a head) has the score ||W_:,j||_2; a KV group
has the sum over its columns. All layers lose the same share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.baselines.subject import Outcome, Subject, best, even_widths, members
from prunus.models.families import dims
from prunus.models.slicing import extract
from prunus.scoring.moments import writer_weight


def compress(subject: Subject, keep: float) -> Outcome:
    """Scores within each layer; widths from `even_widths`."""
    family = subject.family
    attention, mlp = (
        [writer_weight(layer, path).float().norm(dim=0) for layer in subject.stream.layers]
        for path in (family.attention_writer, family.mlp_writer)
    )
    return even(subject, keep, by_group(subject, attention), mlp)


def by_group(subject: Subject, columns: Sequence[Tensor]) -> list[Tensor]:
    """Scores of the attention writer's columns, summed over each KV group with all its query heads."""
    n = dims(subject.model.config)["kv_heads"]
    return [scores.view(n, -1).sum(1) for scores in columns]


@torch.no_grad()
def even(subject: Subject, keep: float, groups: Sequence[Tensor], neurons: Sequence[Tensor]) -> Outcome:
    """The network that keeps the best groups and neurons of every layer, all layers alike."""
    n_groups, n_neurons = even_widths(subject, keep)
    sub = members(subject, [best(s, n_groups) for s in groups], [best(s, n_neurons) for s in neurons])
    return Outcome(extract(subject.model, subject.family, sub), sub)
