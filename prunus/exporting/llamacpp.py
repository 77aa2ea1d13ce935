"""Floor 2: llama.cpp through llama-cpp-python, in a process of its own, since what it cannot load may end the process.

`python -m prunus.exporting.llamacpp` reads a question (JSON) on standard input and writes the answer into a file of
numpy arrays.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from prunus.timing.timetable import Request

PACKAGE = "llama-cpp-python"
F32 = 0  # ggml's number of the type
STEPS = 8  # decoding steps of one file before it is the next one's turn


class LlamaCppError(RuntimeError):
    """llama.cpp could not load or run a file: its last words."""


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a file."""

    logits: np.ndarray[Any, Any]  # (tokens, vocab), float32
    tokens: list[int]  # of the text


def installed() -> str | None:
    """The version of llama-cpp-python, or None."""
    return version(PACKAGE) if importlib.util.find_spec("llama_cpp") is not None else None


def ask(path: Path, tokens: list[int], text: str = "", threads: int = 1) -> Answer:
    """The logits of a GGUF file after each of the tokens, and the tokens of a text by the file's own tokenizer.

    Weights are used as they are in the file, keys and values are kept in float32. Raises LlamaCppError.
    """
    found = _asked("answer", path=str(path), tokens=tokens, text=text, threads=threads)
    return Answer(found["logits"], [int(i) for i in found["tokens"]])


def quantise(source: Path, target: Path, kind: int, threads: int = 1) -> None:
    """Quantise a GGUF file into another one with llama.cpp's own tool; kind: its number of a mixture of types.

    Raises LlamaCppError.
    """
    _asked("quantised", source=str(source), target=str(target), kind=kind, threads=threads)


def timed(
    paths: Sequence[Path], request: Request, *, rounds: int, threads: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Milliseconds of the prompt, and of one decoding step (the mean of a request's), each (rounds, files).

    The files take turns in every round, in another order each time; one round before them is not counted. Keys and
    values are f16, as llama.cpp has it by default. Raises LlamaCppError.
    """
    found = _asked("timed", paths=[str(p) for p in paths], rounds=rounds, threads=threads, **asdict(request))
    return found["prefill"], found["decode"]


def _asked(question: str, **asked: Any) -> dict[str, Any]:
    """One question to a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.npz"
        done = subprocess.run(
            [sys.executable, "-m", "prunus.exporting.llamacpp"],
            input=json.dumps({"question": question, "answer": str(answer), **asked}),
            capture_output=True, text=True, check=False, env=_environment(),
        )  # fmt: skip
        if done.returncode or not answer.is_file():
            raise LlamaCppError(_last_words(done.stderr, done.returncode))
        with np.load(answer) as found:
            return dict(found)


def _environment() -> dict[str, str]:
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _last_words(stderr: str, code: int) -> str:
    """The lines of a log that name the trouble, in few words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return " / ".join(named[:2] or lines[-1:]) or f"it ended with code {code}"


# ------------------------------------------------------------------------------------------------ in its own process


def main() -> None:
    """Answer the question on standard input."""
    asked = json.load(sys.stdin)
    questions = {"answer": _answer, "quantised": _quantised, "timed": _timed}
    found = questions[asked["question"]](asked)
    np.savez(asked["answer"], **found)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    tokens = asked["tokens"]
    model = Llama(
        asked["path"], n_ctx=max(len(tokens), 8), n_batch=max(len(tokens), 8), n_ubatch=max(len(tokens), 8),
        n_threads=asked["threads"], n_threads_batch=asked["threads"], logits_all=True, verbose=True, n_gpu_layers=0,
        type_k=F32, type_v=F32, use_mmap=True,
    )  # fmt: skip
    model.eval(tokens)
    found = model.tokenize(asked["text"].encode(), add_bos=False, special=False) if asked["text"] else []
    logits = np.array(model.scores[: len(tokens)], dtype=np.float32)
    return {"logits": logits, "tokens": np.array(found, dtype=np.int64)}


def _quantised(asked: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import llama_cpp as low

    settings = low.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = asked["threads"], asked["kind"]
    code = low.llama_model_quantize(asked["source"].encode(), asked["target"].encode(), settings)
    if code:
        raise SystemExit(f"error: llama_model_quantize gave {code}")
    return {"code": np.array(code)}


class _Timed:
    """A file in llama.cpp with room for one request."""

    def __init__(self, low: Any, path: str, request: Request, threads: int) -> None:
        self.low, self.request = low, request
        self.model = low.llama_model_load_from_file(path.encode(), low.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"error: cannot load {Path(path).name}")
        settings = low.llama_context_default_params()
        settings.n_ctx = request.batch * (request.prompt + max(1, request.generate) + STEPS)
        settings.n_batch = request.batch * request.prompt
        settings.n_ubatch = min(512, settings.n_batch)
        settings.n_seq_max = request.batch
        settings.n_threads = settings.n_threads_batch = threads
        self.context = low.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"error: no context for {Path(path).name}")
        self.batch = low.llama_batch_init(request.batch * request.prompt, 0, 1)
        self.vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(self.model))
        self.at = 0

    def prefill(self) -> float:
        """Milliseconds of a new prompt, of every sequence of the batch."""
        self.low.llama_memory_clear(self.low.llama_get_memory(self.context), True)
        self.at = 0
        return self._decode(self.request.prompt)

    def steps(self, n: int) -> float:
        """Milliseconds of n decoding steps."""
        return sum(self._decode(1) for _ in range(n))

    def _decode(self, n: int) -> float:
        """n tokens of every sequence; logits after the last."""
        batch, count = self.batch, 0
        for sequence in range(self.request.batch):
            for k in range(n):
                batch.token[count] = (7919 * (self.at + k) + 31 * sequence) % self.vocab
                batch.pos[count], batch.n_seq_id[count] = self.at + k, 1
                batch.seq_id[count][0], batch.logits[count] = sequence, k == n - 1
                count += 1
        batch.n_tokens = count
        start = time.perf_counter()
        if self.low.llama_decode(self.context, batch):
            raise SystemExit("error: llama_decode failed")
        self.low.llama_synchronize(self.context)
        self.at += n
        return 1e3 * (time.perf_counter() - start)


def _timed(asked: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import llama_cpp as low

    low.llama_backend_init()
    request = Request(asked["prompt"], asked["batch"], asked["generate"])
    models = [_Timed(low, path, request, asked["threads"]) for path in asked["paths"]]
    n_steps = max(1, request.generate)
    prefill, decode = np.zeros((2, asked["rounds"] + 1, len(models)))
    for turn in range(asked["rounds"] + 1):
        order = random.Random(turn).sample(range(len(models)), len(models))
        for i in order:
            prefill[turn, i] = models[i].prefill()
        for begin in range(0, n_steps, STEPS):
            for i in order:
                decode[turn, i] += models[i].steps(min(STEPS, n_steps - begin)) / n_steps
    return {"prefill": prefill[1:], "decode": decode[1:]}


if __name__ == "__main__":
    main()
