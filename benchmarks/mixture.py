"""The training text of results/train.json: long pieces of a text, conversations and questions, shuffled, as rows.

    python benchmarks/mixture.py --model demo --text wiki.train.part.txt --alpaca alpaca_en_demo.jsonl \
        --questions commonsense_train_part.jsonl --out mixture.jsonl

Alpaca rows stand in the model's chat template, questions as plain text with their answers; of both so many that they
have `--tokens` tokens. Every token of a row carries a loss: all of it is there to imitate the teacher on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunus.models.loading import load

PIECE = 6000  # characters of the text in a row, at least


def pieces(text: str) -> Iterator[str]:
    """Whole lines of a text, in rows of a good length."""
    row = ""
    for line in text.splitlines(keepends=True):
        row += line
        if len(row) > PIECE:
            yield row
            row = ""
    yield row


def some(
    path: Path, written: Callable[[Any], str], tokens: Callable[[str], int], most: int, rng: random.Random
) -> list[str]:
    """Random rows of a file, until they have more than `most` tokens."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rng.shuffle(rows)
    found: list[str] = []
    spent = 0
    for row in rows:
        if spent > most:
            break
        found.append(written(row))
        spent += tokens(found[-1])
    return found


def main() -> int:
    """Write the mixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="for its tokenizer")
    for name in ("text", "alpaca", "questions", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000, help="of Alpaca rows, and of questions")
    options = parser.parse_args()
    tokenizer: Any = load(options.model).tokenizer
    rng = random.Random(0)

    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    def chat(row: Any) -> str:
        asked = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    def question(row: Any) -> str:
        return str(row["instruction"] + "\n\n" + row["output"])

    rows = list(pieces(options.text.read_text(encoding="utf-8")))
    rows += some(options.alpaca, chat, tokens, options.tokens, rng)
    rows += some(options.questions, question, tokens, options.tokens, rng)
    rng.shuffle(rows)
    options.out.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
