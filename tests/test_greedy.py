"""Greedy removal: candidates that run together are judged as each of them would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny
from torch import nn

from prunus.baselines import sleb
from prunus.baselines.blockpruner import blocks, less
from prunus.baselines.subject import Subject, without
from prunus.models.slicing import extract


@pytest.mark.parametrize("name", CONFIGS)
def test_candidates_together_have_the_losses_of_the_extracted_networks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleb, "TOGETHER", 40)  # two windows of 16 and a rest
    model: Any = tiny(name)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    s = Subject(model, ids, window=16)
    sub = without(s, [1])
    candidates = [less(sub, block) for block in blocks(sub)] + [without(s, [1, 2])]
    found, spent = s.run(lambda: sleb.losses(s, sub, candidates))
    for candidate, value in zip(candidates, found, strict=True):
        with torch.no_grad():
            logits = extract(model, s.family, candidate)(input_ids=ids[:1], use_cache=False).logits
        alone = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        assert value == pytest.approx(float(alone), abs=1e-5)
    n = len(s.whole.layers)
    dearest = n * len(candidates)  # layers, if every candidate ran from the embedding on
    assert 0 < spent.forward_tokens * n / 16 < dearest
