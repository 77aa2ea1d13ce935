"""Calibration tokens: reproducible, disjoint, as many as asked for, never test text; every bad text is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prunus.errors import UserError
from prunus.evaluation import perplexity
from prunus.texts import calibration, sampling
from prunus.texts.calibration import (
    calibration_tokens,
    mixture,
    openings,
    overlap,
    refuse_seen,
    split,
    token_hash,
    windows,
)

STORIES = Path(__file__).resolve().parents[2] / "shared/data/models/stories260k-hf"
LETTERS = [*"\n ", *string.ascii_letters, *string.digits, *".,:;!?'\"()@=-+*/<>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, for models that know 97 tokens; ids 0 to 3 are special."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A text in which no 8 characters occur twice."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"{i:05d}" for i in range(2000)), encoding="utf-8")
    return path


def tokens(
    source: Any, tokenizer: Any, samples: int = 12, length: int = 40, seed: int = 0, **more: Any
) -> torch.Tensor:
    return calibration_tokens(str(source), tokenizer, samples=samples, length=length, seed=seed, **more)


# ------------------------------------------------------------------------------------------------------------- text


def test_windows_are_reproducible_disjoint_pieces_of_the_text(counted: Path, tokenizer: Any) -> None:
    ids, again, other = (tokens(counted, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert ids.shape == (12, 40)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, again)
    assert token_hash(ids) == token_hash(again) != token_hash(other)
    text = counted.read_text(encoding="utf-8")
    letters = ["".join(LETTERS[i - 4] for i in row) for row in ids.tolist()]
    starts = [text.index(row) for row in letters]
    # in the order of the text, and no token twice
    assert all(b - a >= 40 for a, b in itertools.pairwise(starts))


def test_a_text_that_just_fits_is_used_whole() -> None:
    stream = torch.arange(60)
    assert torch.equal(windows(stream, 6, 10, seed=3).flatten(), stream)
    with pytest.raises(UserError, match="6 windows of 10 tokens need 60 tokens, it has 59"):
        windows(stream[:59], 6, 10, seed=3)


def test_held_out_windows_are_a_part_of_the_text_of_their_own(counted: Path, tokenizer: Any) -> None:
    ids = tokens(counted, tokenizer, samples=30, seed=5)
    fit, held = split(ids, 6)
    assert fit.shape == (24, 40)
    assert torch.equal(held, ids[24:])
    assert sorted(fit.tolist()) == sorted(ids[:24].tolist())
    assert overlap(fit, held, n=8) == 0
    assert overlap(ids, held, n=8) == 1
    for bad in (-1, 30):
        with pytest.raises(UserError, match="hold out"):
            split(ids, bad)


def test_a_test_text_that_was_calibrated_on_is_refused() -> None:
    fit, own = torch.arange(4000).reshape(40, 100), torch.arange(10_000, 14_000)
    refuse_seen(fit, own, "test.txt")
    refuse_seen(fit, torch.cat([own, fit[3]]), "test.txt")  # one window of forty: boilerplate
    with pytest.raises(UserError, match=r"10% of the calibration text stands in the test text 'test\.txt' too"):
        refuse_seen(fit, torch.cat([own, fit[3:7].flatten(), own]), "test.txt")


def test_the_hash_tells_shapes_apart() -> None:
    ids = torch.arange(12)
    assert token_hash(ids.view(3, 4)) != token_hash(ids.view(4, 3))
    assert token_hash(ids.view(3, 4)) == token_hash(ids.view(3, 4).to(torch.int32))
    raw = ids.numpy().astype("<i8").tobytes()
    assert token_hash(ids.view(3, 4)) == hashlib.sha256(raw + b"(3, 4)").hexdigest()


def test_openings_are_drawn_from_the_windows_unless_they_all_begin_alike() -> None:
    ids = torch.tensor([[5, 7, 7, 9], [6, 7, 7, 7]])
    drawn = openings(ids, 640, seed=3, bos=1)
    assert drawn is not None and drawn.shape == (640, 1)
    assert int((drawn == 1).sum()) == 40 and set(drawn.flatten().tolist()) == {1, 5, 6, 7, 9}
    assert int((drawn == 7).sum()) > 300  # as often as in the text
    assert torch.equal(drawn, openings(ids, 640, seed=3, bos=1))
    assert not torch.equal(drawn, openings(ids, 640, seed=4, bos=1))
    assert openings(torch.tensor([[1, 5, 6], [1, 7, 8]]), 640) is None
    assert openings(ids, 0) is None


def test_jsonl_takes_the_column_and_shuffles_documents(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "docs.jsonl"
    rows = [{"body": f"document {i:03d} says {i * i}.", "n": i} for i in range(50)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    text = calibration.file_text(path, column="body")
    assert text.split("\n\n") == [r["body"] for r in rows]
    shuffled = calibration.file_text(path, column="body", seed=1).split("\n\n")
    assert shuffled != text.split("\n\n")
    assert sorted(shuffled) == sorted(text.split("\n\n"))
    assert tokens(path, tokenizer, column="body").shape == (12, 40)
    with pytest.raises(UserError, match='no text in column "text"; its text columns are: body'):
        tokens(path, tokenizer)


def test_a_test_text_has_the_column_where_it_can(tmp_path: Path) -> None:
    rows = {"a.jsonl": '\n{"story": "x"}\n', "b.jsonl": '{"text": "x"}', "c.txt": "x", "d.jsonl": "no row"}
    for name, text in rows.items():
        (tmp_path / name).write_text(text)
    found = {name: calibration.column_in(tmp_path / name, "story") for name in rows}
    assert found == {"a.jsonl": "story", "b.jsonl": None, "c.txt": None, "d.jsonl": None}
    assert calibration.column_in(tmp_path / "a.jsonl", None) is None


def test_wikitext_is_joined_by_rows_and_other_text_left_alone(tmp_path: Path) -> None:
    wiki = " \n = A title = \n \n It was well @-@ known . \n"
    path = tmp_path / "wiki.raw"
    path.write_text(wiki, encoding="utf-8")
    joined = "\n\n".join(["", " = A title = \n", "", " It was well @-@ known . \n"])
    assert calibration.file_text(path) == calibration.file_text(path, join="rows") == joined
    assert calibration.file_text(path, join="raw") == wiki
    path.write_text("a\n\nb\n", encoding="utf-8")
    assert calibration.file_text(path) == "a\n\nb\n"


def test_a_very_long_text_is_thinned_before_it_is_tokenised(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(f"{i:06d}" for i in range(60_000)), encoding="utf-8")
    ids = tokens(path, tokenizer, samples=8, length=64)
    assert ids.shape == (8, 64)
    assert torch.equal(ids, tokens(path, tokenizer, samples=8, length=64))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"ab\0cd" * 100, "binary file"),
        (b"caf\xe9 " * 100, "not UTF-8"),
        (b"too short", "12 windows of 40 tokens need 480 tokens, it has 9"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, tokenizer: Any, content: bytes, match: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        tokens(path, tokenizer)


@pytest.mark.parametrize("lines", ['{"text": "a"}\n{"text": \n', "[1, 2]\n", '{"text": 3}\n', '{"text": ""}\n'])
def test_bad_jsonl_is_refused(tmp_path: Path, tokenizer: Any, lines: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=r"line \d|has no text"):
        tokens(path, tokenizer)


def test_missing_sources_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="cannot read the text file"):
        tokens(tmp_path / "none.txt", tokenizer)
    with pytest.raises(UserError, match="neither a file nor one of wikitext2"):
        tokens("wikitext3", tokenizer)
    with pytest.raises(UserError, match="samples >= 1"):
        tokens("generated", tokenizer, samples=0)
    with pytest.raises(UserError, match="no model was given"):
        tokens("generated", tokenizer)


@pytest.mark.parametrize("name", ["wiki.test.raw", "test.txt", "my_tests.txt", "Testset-2.txt"])
def test_test_text_is_refused(counted: Path, tokenizer: Any, name: str) -> None:
    path = counted.rename(counted.with_name(name))
    with pytest.raises(UserError, match="named as test text") as refusal:
        tokens(path, tokenizer)
    assert "another name" in str(refusal.value) and "allow_test" not in str(refusal.value)  # no flag has this name
    assert tokens(path, tokenizer, allow_test=True).shape == (12, 40)


@pytest.mark.parametrize("name", ["latest.txt", "protest.txt", "testimony.txt"])
def test_other_words_with_test_in_them_are_not(counted: Path, tokenizer: Any, name: str) -> None:
    assert tokens(counted.rename(counted.with_name(name)), tokenizer).shape == (12, 40)


def test_tokens_that_the_model_does_not_know_are_refused(counted: Path, tokenizer: Any) -> None:
    model = tiny("llama")
    model.config.vocab_size = 20
    with pytest.raises(UserError, match="do not belong together"):
        tokens(counted, tokenizer, model=model)


def test_bos_stands_in_front_of_every_window_where_asked(counted: Path, tokenizer: Any) -> None:
    ids = tokens(counted, tokenizer, bos=True)
    assert ids.shape == (12, 40)
    assert (ids[:, 0] == 1).all()
    assert (ids[:, 1:] > 3).all()


# ------------------------------------------------------------------------------------------------------ hub, mixtures


def test_mixtures_give_every_source_its_share(counted: Path, tmp_path: Path, tokenizer: Any) -> None:
    assert mixture("a.txt:0.7,b.txt:0.3", 10) == [("a.txt", 7), ("b.txt", 3)]
    assert mixture("a,b,c", 8) in ([("a", 3), ("b", 3), ("c", 2)], [("a", 3), ("b", 2), ("c", 3)])
    assert mixture("generated:chat,c4:3", 8) == [("generated:chat", 2), ("c4", 6)]
    assert mixture("generated:chat", 8) == [("generated:chat", 8)]
    for bad in ("a:0,b", "a:-1,b", ",b", "a:nan,b"):
        with pytest.raises(UserError, match="mixture reads"):
            mixture(bad, 8)
    with pytest.raises(UserError, match="gives b none of 4 windows"):
        mixture("a:100,b:1", 4)
    letters = tmp_path / "letters.txt"
    letters.write_text(string.ascii_letters * 40, encoding="utf-8")
    ids = tokens(f"{counted}:3,{letters}:1", tokenizer)
    of_letters = (ids > 5).all(1) & (ids < 58).all(1)
    assert of_letters.sum() == 3
    assert 0 < of_letters[6:].sum() < 3  # both sources reach both ends, so a held-out tail is of both


def test_hub_data_sets_are_read_by_name(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    asked: list[Any] = []

    class Stream(list[Any]):
        def shuffle(self, seed: int, buffer_size: int) -> Stream:
            return self

    def load(*names: Any, split: str, streaming: bool = False) -> Any:
        asked.append((*names, split, streaming))
        rows = [f"row {i} of a data set \n" for i in range(400)]
        return Stream({"text": r} for r in rows) if streaming else {"text": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert tokens("wikitext2", tokenizer).shape == tokens("c4", tokenizer).shape == (12, 40)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
        ("allenai/c4", "en", "train", True),
    ]


def test_an_absent_hub_is_an_error_with_alternatives(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("wikitext2", "c4"):
        with pytest.raises(UserError, match=r'ConnectionError: no route.*\.jsonl file, or "generated"'):
            tokens(name, tokenizer)


def test_the_default_source_needs_no_hub_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert calibration.auto_source() == "generated"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    assert calibration.auto_source() == "wikitext2"
    with monkeypatch.context() as without:  # as after `make demo`, which installs no reader of data sets
        without.setattr(importlib.util, "find_spec", lambda name: None)
        assert calibration.auto_source() == "generated"

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    assert calibration.auto_source() == "generated"


# --------------------------------------------------------------------------------------------------------- generated


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_writes_full_windows_of_ordinary_tokens(name: str, tokenizer: Any) -> None:
    model = tiny(name).train()
    calls: list[tuple[int, int]] = []
    more: dict[str, Any] = {"model": model, "progress": lambda done, total: calls.append((done, total))}
    ids = tokens("generated", tokenizer, samples=6, length=20, **more)
    assert ids.shape == (6, 20)
    assert (ids > 3).all()
    assert torch.equal(ids, tokens("generated", tokenizer, samples=6, length=20, model=model))
    assert not torch.equal(ids, tokens("generated", tokenizer, samples=6, length=20, model=model, seed=1))
    assert calls[-1] == (120, 120)
    assert model.training
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_greedy_start_is_what_the_model_says_without_a_cache(name: str, tokenizer: Any) -> None:
    model = tiny(name)
    ids = sampling.generated_windows(model, tokenizer, samples=4, length=20, seed=2, greedy=8)
    for place in range(1, 9):
        logits = model(input_ids=ids[:, :place], use_cache=False).logits[:, -1]
        logits[:, :4] = logits[:, len(tokenizer) :] = -torch.inf
        assert torch.equal(logits.argmax(-1), ids[:, place])


def test_sampling_follows_the_models_distribution(tokenizer: Any) -> None:
    model: Any = tiny("llama")
    ids = sampling.generated_windows(model, tokenizer, samples=4000, length=2, seed=0, greedy=0)
    counts = torch.zeros(97, 97).index_put_((ids[:, 0], ids[:, 1]), torch.ones(4000), accumulate=True)
    with torch.no_grad():
        logits = model(torch.arange(97)[:, None]).logits[:, 0]
    logits[:, :4] = logits[:, len(tokenizer) :] = -torch.inf
    expected = counts.sum(1, keepdim=True) * torch.softmax(logits, -1)
    seen = expected > 5
    chi2 = ((counts - expected)[seen].pow(2) / expected[seen]).sum()
    assert float(chi2) < float(seen.sum()) + 5 * (2 * float(seen.sum())) ** 0.5


def test_windows_do_not_depend_on_how_they_are_batched(tokenizer: Any) -> None:
    model = tiny("llama")
    whole, parts = (sampling.generated_windows(model, tokenizer, samples=7, length=16, seed=0, batch=b) for b in (7, 3))
    assert torch.equal(whole, parts)


def test_impossible_generation_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="exceed the model's 64 positions"):
        tokens("generated", tokenizer, length=65, model=tiny("llama"))
    with pytest.raises(UserError, match="chat template"):
        tokens("generated:chat", tokenizer, model=tiny("llama"))
    broken = tiny("llama")
    broken.get_parameter("model.norm.weight").data.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        tokens("generated", tokenizer, length=20, model=broken)


def test_chat_windows_open_with_the_users_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    try:
        ids = tokens("generated:chat", tokenizer, samples=3, length=30, model=tiny("llama"))
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(ids[0, :7]).replace(" ", "") == "<s>user:"


@pytest.mark.skipif(not STORIES.exists(), reason="the trained tiny model is not here")
def test_generated_text_is_likelier_than_random_tokens() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids = tokens("generated", tokenizer, samples=8, length=128, model=model)
    shuffled = ids.flatten()[torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))]
    own, random = (perplexity(model, x, length=128).ppl for x in (ids.flatten(), shuffled))
    assert own < 10
    assert random > 10 * own
    assert len({tuple(row) for row in ids.tolist()}) == 8
