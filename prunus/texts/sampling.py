"""Floor 2: windows of text written by the model itself, for compression without data.

Every window starts with a word of the vocabulary drawn at random and goes on with a few most likely tokens, so that the
windows spread over what the model knows and still read well, then with tokens drawn from the model's distribution (Liu
et al. 2023, LLM-QAT, section 3.1). Chat windows start with the template's opening of a user turn: the model writes the
question and the answer (Xu et al. 2024, Magpie).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask

from prunus.errors import UserError
from prunus.models.memory import give_back

GREEDY = 4  # most likely tokens after the start word
CACHE_BYTES = {"cpu": 2**30, "cuda": 2**32}  # keys and values of one batch
MAX_BATCH = {"cpu": 64, "cuda": 256}


def generated_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    device: torch.device | str = "cpu",
    chat: bool = False,
    bos: int | None = None,
    greedy: int = GREEDY,
    temperature: float = 1.0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Windows (samples, length), int64 on the CPU, that the model writes; special tokens never occur in plain ones.

    The same seed, model, dtype, device and batch give the same tokens. bos: token in front of every window.
    progress: called after every token with (tokens done, tokens in all). Raises UserError where the window is longer
    than the model's positions or the model has no chat template. The model is left as it was.
    """
    check_length(model, length)
    prompts = _chat_prompt(tokenizer, samples) if chat else _start_words(tokenizer, samples, seed)
    if bos is not None and not chat:
        prompts = torch.cat([torch.full((samples, 1), bos), prompts], 1)
    if prompts.shape[1] >= length:
        raise UserError(f"windows of {length} tokens do not hold the prompt of {prompts.shape[1]}; ask for longer ones")
    banned = torch.tensor([] if chat else _special(tokenizer, model), dtype=torch.int64, device=device)
    noise = torch.rand((samples, length), generator=torch.Generator().manual_seed(seed))
    batch = batch if batch is not None else _batch(model, length, torch.device(device).type)
    total, parts = samples * length, []
    with _sampling(model, torch.device(device)):
        for first in range(0, samples, batch):
            rows = slice(first, first + batch)

            def tell(place: int, first: int = first) -> None:
                if progress is not None:
                    progress(first * length + min(batch, samples - first) * place, total)

            filled = _continue(
                model,
                prompts[rows].to(device),
                noise[rows].to(device),
                0 if chat else greedy,
                temperature,
                banned,
                tell,
            )
            parts.append(filled.cpu())
            give_back()
    return torch.cat(parts)


def check_length(model: nn.Module, length: int) -> None:
    """Refuse windows that are longer than the model's positions."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(f"windows of {length} tokens exceed the model's {positions} positions; take shorter ones")


def _continue(
    model: nn.Module,
    ids: Tensor,
    uniform: Tensor,
    greedy: int,
    temperature: float,
    banned: Tensor,
    progress: Callable[[int], None],
) -> Tensor:
    """Fill windows (batch, length) from their first tokens by the inverse of the distribution function."""
    first, length = ids.shape[1], uniform.shape[1]
    cache, step = _cache(model, length), ids
    for place in range(first, length):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[:, -1].float().index_fill_(1, banned, -torch.inf)
        if place - first < greedy:
            step = logits.argmax(-1, keepdim=True)
        else:
            cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
            aim = uniform[:, place, None] * cumulative[:, -1:] * (1 - 1e-6)  # below the last step, never beyond it
            step = torch.searchsorted(cumulative, aim, right=True).clamp_(max=logits.shape[-1] - 1)  # NaN lands behind
        ids = torch.cat([ids, step], 1)
        progress(place + 1)
    if not torch.isfinite(logits.amax(-1)).all():
        raise UserError("the model gives NaN, so it cannot write text; check its weights, or use bfloat16 or float32")
    return ids


def _start_words(tokenizer: PreTrainedTokenizerBase, samples: int, seed: int) -> Tensor:
    """One random token per window, (samples, 1), among those that are letters in any script."""
    generator = torch.Generator().manual_seed(seed)
    special, words = set(tokenizer.all_special_ids), []
    draws = torch.randint(len(tokenizer), (64 * samples + 4096,), generator=generator).tolist()
    for token in draws:
        if token not in special and str(tokenizer.decode([token])).strip().isalpha():
            words.append(token)
            if len(words) == samples:
                break
    if not words:
        raise UserError('no token of this tokenizer is a word, so "generated" cannot start; give a text file')
    return torch.tensor([words[i % len(words)] for i in range(samples)])[:, None]


def _chat_prompt(tokenizer: PreTrainedTokenizerBase, samples: int) -> Tensor:
    """The tokens that open a user's turn, once per window."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError('"generated:chat" needs a tokenizer with a chat template; use "generated"')
    mark = "CONTENT-OF-THE-TURN"
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False))
    ids = tokenizer(text[: text.index(mark)], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)[None].repeat(samples, 1)


def _special(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[int]:
    """Tokens that plain text never holds: stop and other special tokens, and rows that no token uses."""
    config: Any = model.config
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused = set(range(len(tokenizer), config.vocab_size))
    return sorted(i for i in added | set(tokenizer.all_special_ids) | unused if i < config.vocab_size)


def _batch(model: nn.Module, length: int, device: str) -> int:
    """Windows written at once: as many as keep the keys and values small; it depends on shapes only."""
    config: Any = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = next(model.parameters()).element_size()
    token = 2 * config.num_hidden_layers * groups * head_dim * size
    limit = int(CACHE_BYTES.get(device, CACHE_BYTES["cpu"]) // (token * length))
    return max(1, min(limit, MAX_BATCH.get(device, MAX_BATCH["cpu"])))


# ------------------------------------------------------------------------------------------- fast decoding on a CPU


class _Buffered(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values in buffers with room for a whole window, so that a step writes one token instead of copying all.

    Buffers that grow would leave holes between them: 2 GB of them for 44 windows of 1024 tokens of SmolLM2-135M.
    """

    window = 0  # tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new states, (batch, groups, new, head_dim); returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room: list[Tensor] = []
        old = int(self.get_seq_length())
        new = old + key_states.shape[-2]
        if not self.room or new > self.room[0].shape[-2]:
            size = max(new, self.window)
            wider = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states)]
            for buffer, known in zip(wider, self.room, strict=False):
                buffer[:, :, :old] = known[:, :, :old]
            self.room = wider
        for buffer, states in zip(self.room, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.room)
        return self.keys, self.values


def _cache(model: nn.Module, window: int) -> Cache | None:
    """An empty cache; None, which leaves the choice to the model, where layers see a sliding window."""
    config: Any = model.config
    if getattr(config, "sliding_window", None):
        return None
    return Cache(layer_class_to_replicate=type("_Window", (_Buffered,), {"window": window}))


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as two batched products per KV group, without repeated keys: 2.6 x torch's kernel for one query.

    Shapes: query (batch, heads, new, head_dim), key and value (batch, groups, old + new, head_dim).
    """
    batch, heads, new, width = query.shape
    groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    scores = (query.reshape(batch, groups, -1, width) @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, heads, new, -1)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : scores.shape[-1]]
    weight = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    mixed = weight.view(batch, groups, -1, scores.shape[-1]) @ value
    return mixed.view(batch, heads, new, width).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _sampling(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients and, on a CPU, the attention above; all as before on leaving."""
    training, model_any = model.training, model_as_any(model)
    before = model_any.config._attn_implementation
    swap = device.type == "cpu" and before in ("sdpa", "eager")
    if swap:
        AttentionInterface.register("prunus_grouped", _grouped_attention)
        AttentionMaskInterface.register("prunus_grouped", eager_mask)
        model_any.set_attn_implementation("prunus_grouped")
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
        if swap:
            model_any.set_attn_implementation(before)


def model_as_any(model: nn.Module) -> Any:
    """The model with the attributes that transformers gives it."""
    return model


__all__ = ["check_length", "generated_windows"]
