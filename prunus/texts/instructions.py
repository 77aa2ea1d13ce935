"""Floor 2: files of text, instructions or conversations become training windows, with a loss where it belongs.

Rows are Alpaca's (`instruction`, `input`, `output`), conversations (`messages`), or plain text (`text`). Where roles
are known only what the assistant says carries a loss. Plain text carries it everywhere.
"""

from __future__ import annotations

import json
import logging
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, dropwhile
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunus.errors import UserError
from prunus.texts.calibration import _read, encode, file_text, needs_bos
from prunus.training.learning import ROWS, TrainConfig

IGNORED = -100  # the label of a token that carries no loss, as everywhere in transformers
ALPACA = ("instruction", "output")
log = logging.getLogger(__name__)

Piece = tuple[str, bool]  # a stretch of text, and whether it carries a loss


@dataclass(frozen=True)
class Windows:
    """Training windows of one length.

    ids, labels: (n, length), int64. labels[:, t] is ids[:, t] where the token at t is to be predicted from those
    before it, else -100; the first one of a window never is.
    """

    ids: Tensor
    labels: Tensor
    truncated: int = 0  # rows that were longer than a window and lost their end
    skipped: int = 0  # rows that left nothing to learn

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_labels(self) -> int:
        """Tokens that carry a loss."""
        return int((self.labels != IGNORED).sum())

    def split(self, holdout: int) -> tuple[Windows, Windows]:
        """The windows without their last `holdout`, and those."""
        n = len(self) - holdout
        if n < 1:
            raise UserError(
                f"the training data has {len(self)} windows, and {holdout} are to be held out; give more data, shorter "
                "windows (--window) or hold out fewer"
            )
        return Windows(self.ids[:n], self.labels[:n], self.truncated, self.skipped), Windows(
            self.ids[n:], self.labels[n:]
        )


def windows_of(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None, seed: int
) -> tuple[Windows, Windows | None]:
    """The windows that a configuration names, and those of them that are held out; raises UserError as below."""
    windows = training_windows(
        str(config.data), tokenizer, length=config.length, seed=seed, packing=config.packing, column=config.column,
        positions=positions,
    )  # fmt: skip
    return windows.split(config.holdout) if config.holdout else (windows, None)


def training_windows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    seed: int = 0,
    packing: bool = True,
    column: str | None = None,
    positions: int | None = None,
    allow_test: bool = False,
) -> Windows:
    """The windows of a training file: .json or .jsonl rows, or any other text, the same for the same arguments.

    packing: rows stand one after another, an end-of-text token between them, and windows are cut from that, so a row
        may run over two; else every row has a window of its own, filled up at its end, and what is longer is cut.
    positions: how many the model knows. Raises UserError for what cannot be read, for text that is named as test text,
    for windows longer than the model's positions, and where no token would carry a loss.
    """
    path = Path(path)
    if length < 2 or (positions is not None and length > positions):
        limit = "" if positions is None else f" and at most the model's {positions} positions"
        raise UserError(f"a training window has at least 2 tokens{limit}; given --window {length}")
    _refuse_test(path, allow_test)
    rows = list(read_rows(path, column)) if path.suffix.lower() in ROWS else None
    if rows is None:
        windows = _text_windows(file_text(path), tokenizer, length)
    else:
        windows = _row_windows(rows, tokenizer, length, packing, seed)
    if not len(windows) or not windows.n_labels:
        raise UserError(
            f"{path.name} leaves nothing to learn in windows of {length} tokens: no token would carry a loss; give "
            "longer rows, rows with an answer, or another length"
        )
    if windows.truncated or windows.skipped:
        log.warning(
            "%s: %d rows were longer than %d tokens and lost their end, %d rows held nothing to learn",
            path.name, windows.truncated, length, windows.skipped,
        )  # fmt: skip
    return windows


def _refuse_test(path: Path, allow: bool) -> None:
    import re

    if not allow and re.search(r"(?<![a-z])test(s|set|ing|data)?(?![a-z])", path.name.lower()):
        raise UserError(
            f"{path.name} is named as test text; training on it would make every figure measured on it worthless; use "
            "training text"
        )


# ------------------------------------------------------------------------------------------------------------- rows


def read_rows(path: Path, column: str | None = None) -> Iterator[list[dict[str, str]] | str]:
    """Conversations (lists of `role` and `content`) or texts; raises UserError naming the row that is neither."""
    for number, raw in _objects(path):
        where = f"{path.name}, row {number}"
        row = _row(raw, where, column)
        try:
            "".join([row] if isinstance(row, str) else [message["content"] for message in row]).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half of a character ({error.reason}); mend or delete the row") from error
        yield row


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    text = _read(path)
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path.name} is not JSON that can be read ({error}); give a list of rows") from error
        if isinstance(whole, dict):  # {"data": [...]}: the one list in it
            lists = [value for value in whole.values() if isinstance(value, list)]
            whole = lists[0] if len(lists) == 1 else None
        if not isinstance(whole, list):
            raise UserError(f"{path.name} holds no list of rows; give a .json list or a .jsonl with one row a line")
        yield from enumerate(whole, 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path.name}, line {number}: not JSON ({error})") from error


def _row(raw: Any, where: str, column: str | None) -> list[dict[str, str]] | str:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} is a {type(raw).__name__}, not an object with named fields")
    talks = {"messages", "conversations", "output"} & raw.keys()
    if column is not None or ("text" in raw and not talks):
        text = raw.get(column or "text")
        if not isinstance(text, str):
            raise UserError(f"{where} has no text in the field {column or 'text'!r}; its fields are: {', '.join(raw)}")
        return text
    if "messages" in raw or "conversations" in raw:
        return _messages(raw.get("messages", raw.get("conversations")), where)
    if all(isinstance(raw.get(key), str) for key in ALPACA):
        asked = raw["instruction"].strip()
        if isinstance(raw.get("input"), str) and raw["input"].strip():
            asked = f"{asked}\n\n{raw['input'].strip()}"
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": raw["output"].strip()}]
    raise UserError(
        f"{where} has the fields {', '.join(raw) or 'none'}; a row has `instruction` and `output` (and `input`), "
        "`messages`, or `text`"
    )


def _messages(raw: Any, where: str) -> list[dict[str, str]]:
    names = {"human": "user", "gpt": "assistant"}
    found: list[dict[str, str]] = []
    for message in raw if isinstance(raw, list) else [None]:
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: every message has a `role` and a text `content`; given {str(message)[:80]}")
        found.append({"role": names.get(role, role), "content": content})
    return found


# ---------------------------------------------------------------------------------------------------------- windows


def _text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Windows:
    ids = encode(text, tokenizer, special=False)
    return _cut(ids, torch.ones_like(ids, dtype=torch.bool), tokenizer, length)


def _cut(ids: Tensor, learnt: Tensor, tokenizer: PreTrainedTokenizerBase, length: int) -> Windows:
    """Windows of a stream (n,), the last tokens that fill none left out; `learnt` says which tokens carry a loss."""
    bos = int(tokenizer.bos_token_id) if needs_bos(tokenizer) else None
    width = length - (bos is not None)
    n = len(ids) // width
    rows, mask = ids[: n * width].view(n, width), learnt[: n * width].view(n, width)
    if bos is not None:
        rows = torch.cat([torch.full((n, 1), bos), rows], 1)
        mask = torch.cat([torch.zeros((n, 1), dtype=torch.bool), mask], 1)
    labels = rows.masked_fill(~mask, IGNORED)
    labels[:, 0] = IGNORED
    kept = (labels != IGNORED).any(1)
    return Windows(rows[kept].contiguous(), labels[kept].contiguous())


def _row_windows(
    rows: Sequence[list[dict[str, str]] | str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    packing: bool,
    seed: int,
) -> Windows:
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    encoded, skipped = [], 0
    for i in order:
        try:
            ids, mask = tokens_of(rows[i], tokenizer)
        except UserError as error:
            raise UserError(f"row {i + 1} of {len(rows)}: {error}") from error
        if mask[1:].any():
            encoded.append((ids, mask))
        else:
            skipped += 1
    if not encoded:
        raise UserError(f"none of {len(rows)} rows holds an answer or a text to learn; give rows with an `output`")
    if packing:
        windows = _cut(torch.cat([i for i, _ in encoded]), torch.cat([m for _, m in encoded]), tokenizer, length)
        return Windows(windows.ids, windows.labels, 0, skipped)
    return _padded(encoded, tokenizer, length, skipped)


def _padded(
    encoded: Sequence[tuple[Tensor, Tensor]], tokenizer: PreTrainedTokenizerBase, length: int, skipped: int
) -> Windows:
    fill = int(tokenizer.eos_token_id or 0)  # carries no loss; a pad token may be one that the model has no row for
    if needs_bos(tokenizer):
        encoded = [_after_bos(own, mask, int(tokenizer.bos_token_id)) for own, mask in encoded]
    ids = torch.full((len(encoded), length), fill)
    labels = torch.full((len(encoded), length), IGNORED)
    truncated = 0
    for row, (own, mask) in enumerate(encoded):
        truncated += len(own) > length
        n = min(len(own), length)
        ids[row, :n] = own[:n]
        labels[row, :n] = own[:n].masked_fill(~mask[:n], IGNORED)
    labels[:, 0] = IGNORED
    kept = (labels != IGNORED).any(1)
    return Windows(ids[kept], labels[kept], truncated, skipped + int((~kept).sum()))


def _after_bos(ids: Tensor, learnt: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """The same with BOS in front, where the chat template has put none there."""
    if int(ids[0]) == bos:
        return ids, learnt
    return torch.cat([torch.tensor([bos]), ids]), torch.cat([torch.tensor([False]), learnt])


def tokens_of(row: list[dict[str, str]] | str, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Tokens of one row (n,), and which of them carry a loss (n,): all of a text, the assistant's of a conversation."""
    pieces = [(row, True)] if isinstance(row, str) else _pieces(row, tokenizer)
    ids, learnt = _encoded(pieces, tokenizer)
    end = tokenizer.eos_token_id
    if ids and end is not None and ids[-1] != end and not (pieces and pieces[-1][0].rstrip().endswith(_end(tokenizer))):
        ids.append(int(end))
        learnt.append(pieces[-1][1])
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(learnt, dtype=torch.bool)


def _encoded(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokens of all pieces together, since many tokenizers write a blank before each text, and which carry a loss.

    A token that crosses from one piece into the next belongs to the first.
    """
    if tokenizer.is_fast:
        whole = "".join(text for text, _ in pieces)
        found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if whole else {}
        ends = [*accumulate(len(text) for text, _ in pieces)]
        starts = [start for start, _ in found.get("offset_mapping", [])]
        carried = [carries for _, carries in pieces]
        own = [carried[min(bisect_right(ends, start), len(carried) - 1)] for start in starts]
        return list(found.get("input_ids", [])), own
    ids: list[int] = []
    learnt: list[bool] = []
    for text, carries in pieces:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        ids += own
        learnt += [carries] * len(own)
    return ids, learnt


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.eos_token)


def _pieces(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A conversation as the tokenizer's chat template writes it, cut where the assistant begins and ends."""
    if not tokenizer.chat_template:
        return _plain(messages)
    messages = list(dropwhile(lambda message: message["role"] == "assistant", messages))  # answers without a question
    done, pieces = "", list[Piece]()
    for n, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        before, after = _written(messages, n - 1, tokenizer)
        if not before.startswith(done) or not after.startswith(before):
            return _whole_reply(messages, tokenizer)
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def _whole_reply(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Where a template writes earlier turns anew (it drops old reasoning, say): only the last reply is learnt."""
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    before, after = _written(messages, last, tokenizer)
    if not after.startswith(before):
        raise UserError(
            "the tokenizer's chat template writes a conversation so that its last reply cannot be told from the rest; "
            "give plain text (`text`) instead"
        )
    return [(before, False), (after[len(before) :], True)]


def _written(messages: Sequence[dict[str, str]], n: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The first n messages, ready for a reply, and the same with the next message, by the chat template."""
    try:
        before = tokenizer.apply_chat_template(list(messages[:n]), tokenize=False, add_generation_prompt=True)
        return str(before), str(tokenizer.apply_chat_template(list(messages[: n + 1]), tokenize=False))
    except (TemplateError, ValueError) as error:
        raise UserError(
            f"the tokenizer's chat template cannot write a conversation of roles "
            f"{', '.join(message['role'] for message in messages)}: {error}. Leave out or merge what it does not know"
        ) from error


def _plain(messages: Sequence[dict[str, str]]) -> list[Piece]:
    """Without a chat template: a heading for each turn, as Alpaca's prompts have them."""
    titles = {"user": "### Instruction:", "assistant": "### Response:", "system": "### System:"}
    pieces = list[Piece]()
    for message in messages:
        title = titles.get(message["role"], f"### {message['role'].capitalize()}:")
        said = message["role"] == "assistant"
        pieces.append((f"{title}\n", False))
        pieces.append((message["content"].strip(), said))
        pieces.append(("" if said and message is messages[-1] else "\n\n", False))
    while pieces and not pieces[-1][0]:
        pieces.pop()
    return pieces


__all__ = ["IGNORED", "Windows", "read_rows", "tokens_of", "training_windows", "windows_of"]
