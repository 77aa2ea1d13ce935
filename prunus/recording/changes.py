"""Floor 0: which settings of an existing run may change, and which of its steps must then be done again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.config import STEPS, settings
from prunus.setting import ANYWHERE
from prunus.targets import LIMITS

TARGETS = ("keep", *(f"budget.{kind}" for kind in LIMITS))  # more of the same kind only add networks
FIRST = {"report": "evaluate"}  # a verb that does more than the step of its name: the first step that is its own
VERBS = {"evaluate": "report", "front": "search"}  # the verb of a step that has none of its own


def step_of(key: str, steps: Sequence[str] = STEPS) -> str:
    """The step that first reads a setting; the first of all for a key that is not ours."""
    return settings()[key].step if key in settings() else steps[0]


def is_free(key: str) -> bool:
    """True for a setting that says where to compute, not what."""
    return step_of(key) == ANYWHERE


def only_adds(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """True if a setting's new value leaves all that was made with the old ones right: more ratios, a first text, or
    anything of a front where there is none so far."""
    if key in TARGETS:
        return bool(old.get(key)) and set(old[key]) <= set(new.get(key) or ())
    if key.startswith("front."):
        return not old.get("front.objectives")
    return key == "test_text" and not old.get(key) and bool(new.get(key))


def first_touched(
    steps: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]
) -> str | None:
    """The first step that a change of these dotted keys makes stale, or None; more ratios touch only the report."""
    touched, fronts = [], old.get("front.objectives") or new.get("front.objectives")
    for key in keys:
        if key.startswith("front.") and not fronts:
            continue
        if key in TARGETS and only_adds(key, old, new):
            touched.append("report")
        elif not is_free(key) and key != "model":
            touched.append(step_of(key, steps))
    return min(touched, key=list(steps).index, default=None)


def advice(run: Path, values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What to do about settings that may not take these values, for the end of a sentence: a command to copy."""
    own = [step_of(key) for key in keys]
    if STEPS[0] in own:
        return "leave them as they are: everything else was made from them"
    first = min(own, key=STEPS.index)
    verb = VERBS.get(first, first)
    wanted = [word for key in keys for word in ("--set", f"{key}={_typed(values.get(key))}")]
    return f"do that step and the later ones again: {shlex.join(['prunus', verb, str(run), *wanted])}"


def _typed(value: Any) -> str:
    """A value as it is typed after --set."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)


def show(values: Mapping[str, Any], key: str) -> str:
    """A value as it is written in a file, for a message."""
    return json.dumps(values[key]) if key in values else "nothing"
