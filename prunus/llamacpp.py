"""Floor 2: llama.cpp through llama-cpp-python, in a process of its own, since what it cannot load may end the process.

`python -m prunus.llamacpp` reads a question (JSON) on standard input and writes the answer into a file of numpy arrays.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llama-cpp-python"
F32 = 0  # ggml's number of the type


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
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.npz"
        question = {"path": str(path), "tokens": tokens, "text": text, "threads": threads, "answer": str(answer)}
        done = subprocess.run(
            [sys.executable, "-m", "prunus.llamacpp"],
            input=json.dumps(question), capture_output=True, text=True, check=False,
            env=_environment(),
        )  # fmt: skip
        if done.returncode or not answer.is_file():
            raise LlamaCppError(_last_words(done.stderr, done.returncode))
        with np.load(answer) as found:
            return Answer(found["logits"], [int(i) for i in found["tokens"]])


def _environment() -> dict[str, str]:
    here = str(Path(__file__).resolve().parents[1])
    paths = [here, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _last_words(stderr: str, code: int) -> str:
    """The lines of a log that name the trouble, in few words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return " / ".join(named[:2] or lines[-1:]) or f"it ended with code {code}"


def main() -> None:
    """Answer the question on standard input."""
    from llama_cpp import Llama

    asked = json.load(sys.stdin)
    tokens = asked["tokens"]
    model = Llama(
        asked["path"], n_ctx=max(len(tokens), 8), n_batch=max(len(tokens), 8), n_ubatch=max(len(tokens), 8),
        n_threads=asked["threads"], n_threads_batch=asked["threads"], logits_all=True, verbose=True, n_gpu_layers=0,
        type_k=F32, type_v=F32, use_mmap=True,
    )  # fmt: skip
    model.eval(tokens)
    found = model.tokenize(asked["text"].encode(), add_bos=False, special=False) if asked["text"] else []
    logits = np.array(model.scores[: len(tokens)], dtype=np.float32)
    np.savez(asked["answer"], logits=logits, tokens=np.array(found, dtype=np.int64))


if __name__ == "__main__":
    main()
