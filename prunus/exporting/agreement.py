"""Floor 2: do two programs compute the same? A text to try, log-probabilities, and how far they are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

TEXT = (
    "In 1987 the town's 3,204 people didn't yet know: \"Café Müller\" would close on 12 May.\n\n"
    "They'd   waited; however, it wasn't until 2005 (18 years later!) that the river rose above 4.75 m.\n"
    "\tdef area(r): return 3.14159 * r ** 2  # naïve — 日本語 и русский 🙂\n"
)
N_TOKENS = 128  # of the text that logits are compared on


def text_tokens(tokenizer: Any) -> list[int]:
    """The text by a tokenizer, without special tokens."""
    return list(tokenizer(TEXT, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def log_probabilities(model: Any, tokens: list[int]) -> Tensor:
    """(tokens, vocab), float64, on the CPU."""
    ids = torch.tensor([tokens], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.cpu().double().log_softmax(-1)


def divergence(reference: Tensor, given: Tensor) -> float:
    """KL(reference || given) of log-probabilities (tokens, vocab), nats per token; infinite where one is not finite."""
    kl = (reference.exp() * (reference - given)).sum(-1).mean()
    return max(0.0, float(np.nan_to_num(float(kl), nan=np.inf)))


def agreement(reference: Tensor, given: Tensor) -> float:
    """Share of tokens after which both think the same token the most likely."""
    return float((given.argmax(-1) == reference.argmax(-1)).float().mean())
