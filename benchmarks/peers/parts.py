"""benchmarks/results/peers.json: every script of this folder writes its part and leaves the others as they are."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.config import CalibrationConfig
from prunus.texts.calibration import calibration_tokens, split

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCHMARKS))
import record  # noqa: E402  the folder above

RESULTS = BENCHMARKS / "results" / "peers.json"


def parser(description: str | None, samples: int, length: int) -> argparse.ArgumentParser:
    """The arguments that all scripts share."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model")
    found.add_argument("--calibration", required=True)
    found.add_argument("--samples", type=int, default=samples)
    found.add_argument("--length", type=int, default=length)
    found.add_argument("--results", type=Path, default=RESULTS)
    return found


def tokens(options: argparse.Namespace, loaded: Any) -> Any:
    """The calibration windows of `prunus bench` with the same --samples and --length, (samples, length)."""
    holdout = CalibrationConfig().holdout
    ids = calibration_tokens(
        options.calibration,
        loaded.tokenizer,
        samples=options.samples + holdout,
        length=options.length,
        seed=0,
        model=loaded.model,
    )
    return split(ids, holdout)[0]


def write(path: Path, part: str, rows: Sequence[Mapping[str, Any]], views: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace a part: its rows, and its views, which show no other rows."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"commands": {}, "rows": [], "views": {}}
    commands = {**old["commands"], part: record.typed()}
    own = [{"part": part, **row} for row in rows]
    shown = {name: {**view, "where": {"part": part, **view.get("where", {})}} for name, view in views.items()}
    rows = [*(row for row in old["rows"] if row["part"] != part), *own]
    more = {"command": "; ".join(commands.values()), "commands": commands}
    record.write(path, rows, {**old["views"], **shown}, **more)
    print(json.dumps(own, indent=1))
