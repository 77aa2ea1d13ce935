"""Floor 1: the table of settings in docs/cli.md, drawn from the settings: `python -m prunus.handbook docs/cli.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from prunus.config import settings
from prunus.setting import Setting

BEGIN, END = "<!-- settings: drawn by python -m prunus.handbook -->", "<!-- end of settings -->"
KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def table() -> str:
    """Every setting with its flag, what it may be, its default, and the step that first reads it, in Markdown."""
    head = "| setting | flag | may be | default | what it is | step |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_row(one) for one in settings().values())])


def _row(one: Setting) -> str:
    may_be = ", ".join(one.choices) or KINDS.get(one.plain, "names" if one.many and one.item is str else "numbers")
    flag = f"`--{one.flag}`" if one.flag else "MODEL" if one.key == "model" else ""
    cells = (f"`{one.key}`", flag, f"{may_be} {one.range}".strip(), one.shown, one.help, one.step)
    return f"| {' | '.join(cells)} |"


def drawn(page: str) -> str:
    """The page with its table drawn again."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(drawn(path.read_text(encoding="utf-8")), encoding="utf-8")
