"""Training files become windows with the loss where it belongs; what cannot be learnt from is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from prunus.errors import UserError
from prunus.texts.instructions import IGNORED, tokens_of, training_windows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL = SHARED / "models" / "stories260k-hf"
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="needs the tiny tokenizer of the data beside the project")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Say hello."},
    {"role": "assistant", "content": "Hello there!"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Once upon a time."},
]


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_only_what_the_assistant_says_is_learnt(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    ids, learnt = tokens_of(TALK, tokenizer)
    said = tokenizer.decode(ids[learnt])
    assert "Hello there!" in said
    assert "Once upon a time." in said
    assert "Say hello" not in said
    assert "user" not in said
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]  # no blank where a turn begins


def test_an_answer_without_a_question_is_not_learnt(tokenizer: Any, tmp_path: Path) -> None:
    """Dumps of conversations are cut anywhere. A template may refuse a conversation of no turns."""
    tokenizer.chat_template = CHAT
    begun = [{"role": "assistant", "content": "As I said."}, *TALK]
    assert all(torch.equal(a, b) for a, b in zip(tokens_of(begun, tokenizer), tokens_of(TALK, tokenizer), strict=True))
    assert not len(tokens_of(begun[:1], tokenizer)[0])
    named = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in begun]
    file = write(tmp_path / "rows.jsonl", [{"conversations": named, "text": "all of it"}] * 8)
    windows = training_windows(str(file), tokenizer, length=32, packing=False)
    assert "all of it" not in tokenizer.decode(windows.ids[0])


def test_what_a_template_refuses_is_named_with_its_row(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    rows = [{"messages": TALK}, {"messages": [{"role": "system", "content": "Be kind."}, *TALK]}]
    with pytest.raises(UserError, match=r"row 2 of 2: .* conversation of roles system, user, .*no system role"):
        training_windows(str(write(tmp_path / "rows.jsonl", rows)), tokenizer, length=32)


def test_without_a_template_turns_have_headings(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    ids, learnt = tokens_of(TALK[:2], tokenizer)
    assert tokenizer.decode(ids[learnt], skip_special_tokens=True).strip() == "Hello there!"
    assert int(ids[-1]) == tokenizer.eos_token_id
    assert bool(learnt[-1])
    assert "### Response:" in tokenizer.decode(ids)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_alpaca_rows_and_conversations_give_the_same_windows(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    alpaca = [{"instruction": "Say hello.", "input": "", "output": "Hello there!"}] * 3
    talks = [{"messages": TALK[:2]}] * 3
    found = []
    for name, rows in (("a", alpaca), ("b", talks)):
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".json":
            path.write_text(json.dumps({"data": rows}))
        else:
            write(path, rows)
        found.append(training_windows(path, tokenizer, length=128, packing=False))
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.equal(found[0].labels, found[1].labels)
    assert len(found[0]) == 3
    assert 0 < found[0].n_labels < found[0].ids.numel() / 2


def test_labels_are_the_tokens_or_ignored_and_never_the_first(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a dog. " * 40)
    windows = training_windows(text, tokenizer, length=16)
    assert bool((windows.labels[:, 0] == IGNORED).all())
    assert torch.equal(windows.labels[:, 1:], windows.ids[:, 1:])
    first, rest = windows.split(2)
    assert (len(first), len(rest)) == (len(windows) - 2, 2)


def test_packing_loses_no_token_but_the_last_window(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": f"The {k} dogs ran."} for k in range(50)])
    packed = training_windows(path, tokenizer, length=16)
    single = training_windows(path, tokenizer, length=16, packing=False)
    total = sum(len(tokens_of(f"The {k} dogs ran.", tokenizer)[0]) for k in range(50))
    assert packed.ids.numel() == total // 16 * 16
    assert len(single) == 50


def test_long_rows_are_cut_with_a_count(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "A dog ran. " * 30}, {"text": "A cat."}, {"text": ""}]
    found = training_windows(write(tmp_path / "rows.jsonl", rows), tokenizer, length=16, packing=False)
    assert (found.truncated, found.skipped, len(found)) == (1, 1, 2)
    assert "1 rows were longer than 16 tokens" in caplog.text


def test_windows_begin_with_bos_where_a_model_needs_it(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    rows = [{"text": "A dog ran."}, {"text": "<bos>A cat."}, {"text": "A dog ran. " * 30}]
    for packing in (True, False):
        found = training_windows(write(tmp_path / "rows.jsonl", rows), tokenizer, length=16, packing=packing)
        assert bool((found.ids[:, 0] == tokenizer.bos_token_id).all())
        assert not bool((found.ids[:, 1] == tokenizer.bos_token_id).any()) or packing
        assert bool((found.labels[:, 0] == IGNORED).all())


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("rows.jsonl", "", "is empty"),
        ("rows.jsonl", "{broken", "line 1: not JSON"),
        ("rows.json", '{"a": 1}', "holds no list"),
        ("rows.jsonl", '["text"]', "row 1 is a list"),
        ("rows.jsonl", '{"question": "x", "answer": "y"}', "has the fields question, answer"),
        ("rows.jsonl", '{"messages": [{"role": "user"}]}', "every message has a `role`"),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "none of 1 rows holds an answer"),
        ("rows.jsonl", '{"instruction": "x", "output": ""}', "none of 1 rows holds an answer"),
        ("rows.jsonl", '{"text": 5}', "no text in the field 'text'"),
        ("rows.jsonl", '{"text": "half \\ud800 of one"}', "row 1 holds half of a character"),
        ("rows.jsonl", f'{{"text": {"9" * 5000}}}', "line 1: not JSON"),
        ("rows.json", "[" * 100_000, "is not JSON that can be read"),
        ("story.txt", "Too short.", "leaves nothing to learn in windows of 64"),
        ("wiki.test.txt", "Some text " * 100, "named as test text"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(
    name: str, text: str, match: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template, tokenizer.eos_token = None, None
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match):
        training_windows(tmp_path / name, tokenizer, length=64)


def test_windows_longer_than_the_model_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most the model's 512 positions"):
        training_windows(tmp_path / "none.txt", tokenizer, length=513, positions=512)
