"""Exported files at work in llama.cpp: the text is that of transformers, and the OpenAI-compatible server answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_export import exported
from tiny import ragged
from transformers import AutoModelForCausalLM
from words import RUNTIME, TEMPLATE, bytes_bpe, cut, sentencepiece_bpe, tiny

SERVER = pytest.mark.skipif(
    not all(find_spec(name) for name in ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context")),
    reason="needs llama-cpp-python's server (the extra llama-cpp)",
)


@RUNTIME
@pytest.mark.parametrize("words", [bytes_bpe, sentencepiece_bpe])
def test_greedy_text_is_that_of_transformers(words: Any, tmp_path: Path) -> None:
    from llama_cpp import Llama

    model, tokenizer = tiny("llama"), words()
    found = exported(cut(model, ragged(model.config)), tmp_path, words=tokenizer)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokenizer("the rain in", return_tensors="pt")["input_ids"]
    want = small.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)[0].tolist()
    llama = Llama(found["file"], n_ctx=64, n_threads=1, verbose=False)
    assert llama.tokenize(b"the rain in", add_bos=False) == ids[0].tolist()
    out = list(ids[0].tolist())
    for token in llama.generate(ids[0].tolist(), temp=0.0, top_k=1):
        out.append(token)
        if len(out) == len(want):
            break
    assert out == want
    assert llama.metadata["tokenizer.chat_template"] == TEMPLATE


@SERVER
def test_the_openai_compatible_server_answers(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), bytes_bpe()
    for text, i in tokenizer.get_vocab().items():  # only plain letters are ever the most likely
        if text.startswith("<") or not text.replace("Ġ", " ").isascii():
            model.lm_head.weight.data[i] = 0
    found = exported(cut(model, ragged(model.config)), tmp_path, "f32")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", found["file"], "--port", str(port)]
    command += ["--host", "127.0.0.1", "--n_ctx", "64", "--n_threads", "1", "--model_alias", "small"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        models = _asked(port, "models", None, server, tmp_path / "log")
        assert [one["id"] for one in models["data"]] == ["small"]
        body = {
            "messages": [{"role": "user", "content": "the rain"}],
            "max_tokens": 6,
            "temperature": 0,
            "repeat_penalty": 1.0,
        }
        answer = _asked(port, "chat/completions", body, server, tmp_path / "log")
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"]["role"] == "assistant"
        ids = tokenizer("<s>the rain</s><s>", return_tensors="pt")["input_ids"]  # what the chat template makes of it
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        assert answer["usage"]["completion_tokens"] == 6
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        want = tokenizer.decode(small.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
        assert answer["choices"][0]["message"]["content"].strip() == want.strip()
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def _asked(port: int, path: str, body: dict[str, Any] | None, server: Any, log: Path) -> dict[str, Any]:
    """An answer of the server; waits until it listens."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    end = time.monotonic() + 120
    while True:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > end:
                raise
            time.sleep(0.2)
