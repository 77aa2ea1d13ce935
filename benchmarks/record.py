"""The results file of a benchmark: what was typed, where it ran, the rows, and how benchmarks/render.py shows them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.machine import environment, words


def typed() -> str:
    """The command line of this process, without the folders of one machine."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[1])
    return shlex.join(["python", str(script), *(re.sub(r"[^=;\s]*/", "", a) for a in sys.argv[1:])])


def write(path: Path, rows: Sequence[Mapping[str, Any]], views: Mapping[str, Any], **more: Any) -> None:
    """Write `path`, a json file; more: further entries, which go before those that every file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"command": typed(), "machine": words(), "versions": environment(), **more, "rows": rows, "views": views}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
