"""Floor 3: Wanda-sp: Wanda (Sun et al. 2023, arXiv:2306.11695) for units, as An et al. 2023, arXiv:2312.11983 do it.

A column of a writer has the score mean_i |W_ij| ||X_j||, a KV group the sum over its columns. All layers lose the same
share. The released code judges every layer on what the pruned layers before it produce; `sequential=False` takes the
dense model's activations for all layers instead.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prunus.baselines.activity import activity, walk
from prunus.baselines.magnitude import by_group, even
from prunus.baselines.subject import Outcome, Subject, best, even_widths
from prunus.models.families import dims
from prunus.scoring.moments import writer_weight
from prunus.scoring.scores import wanda


def compress(subject: Subject, keep: float, *, sequential: bool = True) -> Outcome:
    """Scores within each layer; widths from `even_widths`."""
    family = subject.family
    writers = {"attention": family.attention_writer, "mlp": family.mlp_writer}
    scores: dict[str, list[Tensor]] = {which: [] for which in writers}
    if not sequential:
        seen = activity(subject)
        for i, layer in enumerate(subject.stream.layers):
            for which, path in writers.items():
                scores[which].append(wanda(writer_weight(layer, path), seen.square[which][i]).mean(0))
        return even(subject, keep, by_group(subject, scores["attention"]), scores["mlp"])
    n_groups, n_neurons = even_widths(subject, keep)
    n = dims(subject.model.config)["kv_heads"]

    def cut(i: int, layer: nn.Module, square: Mapping[str, Tensor]) -> None:
        for which, path in writers.items():
            weight = writer_weight(layer, path)
            found = wanda(weight, square[path]).mean(0)
            scores[which].append(found)
            units = found.view(n, -1).sum(1) if which == "attention" else found
            kept = best(units, n_groups if which == "attention" else n_neurons)
            mask = units.new_zeros(len(units)).index_fill(0, kept, 1).repeat_interleave(len(found) // len(units))
            weight.mul_(mask.to(weight.dtype))  # a unit that nobody reads is as good as gone

    walk(subject, list(writers.values()), cut)
    return even(subject, keep, by_group(subject, scores["attention"]), scores["mlp"])
