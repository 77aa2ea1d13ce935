"""Floor 3: BlockPruner (Zhong et al. 2024, arXiv:2406.10594): greedily, the least needed attention or MLP leaves.

Their algorithm 1: in every round each attention and each MLP that is left is masked alone, and the one without which
the perplexity is least leaves, until the budget is met. Attention and MLP count alike, whatever their sizes.
"""

from __future__ import annotations

from dataclasses import replace

from prunus.baselines.sleb import least
from prunus.baselines.subject import FIRST_STAYS, Outcome, Subject
from prunus.errors import UserError
from prunus.models import costs
from prunus.models.slicing import extract
from prunus.subnetwork import SubNetwork

Block = tuple[int, str]  # layer, "attention" or "mlp"


def compress(subject: Subject, keep: float) -> Outcome:
    """Networks of smaller shares continue the removals of larger ones."""
    sub, order = subject.whole, list[Block]()
    while costs.parameters(subject.layout, sub) > subject.budget(keep):
        candidates = blocks(sub)
        if not candidates:
            raise UserError(f"cannot keep {keep:g}: nothing but the attention of layer 0 is left; keep more")
        subs = [less(sub, block) for block in candidates]
        at = subject.once(("blockpruner", tuple(order)), lambda a=sub, s=subs: least(subject, a, s))  # type: ignore[misc]
        order.append(candidates[at])
        sub = subs[at]
    note = "left in this order: " + (", ".join(f"{part} {i}" for i, part in order) or "none")
    return Outcome(extract(subject.model, subject.family, sub), sub, (note, FIRST_STAYS))


def blocks(sub: SubNetwork) -> list[Block]:
    """The sub-layers that may leave."""
    found: list[Block] = [(i, "attention") for i, s in enumerate(sub.layers) if s.attends and i]
    return found + [(i, "mlp") for i, s in enumerate(sub.layers) if s.mlp]


def less(sub: SubNetwork, block: Block) -> SubNetwork:
    """The network without one more sub-layer."""
    i, part = block
    shape = replace(sub.layers[i], kv_heads=0, q_per_kv=0) if part == "attention" else replace(sub.layers[i], mlp=0)
    return replace(sub, layers=(*sub.layers[:i], shape, *sub.layers[i + 1 :]))
