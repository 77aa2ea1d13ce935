"""Floor 3: zero-shot and few-shot tasks by lm-eval, with its standard errors: the field's figures beside perplexity."""

from __future__ import annotations

import difflib
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prunus import machine
from prunus.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """One task: how many examples stand before the question, and which figure counts."""

    task: str
    shots: int
    metric: str


def _suite(*rows: tuple[str, int, str]) -> tuple[Asked, ...]:
    return tuple(Asked(*row) for row in rows)


SUITES: Mapping[str, tuple[Asked, ...]] = MappingProxyType(
    {
        # Sukthanker et al. 2025 (arXiv:2410.06479v3), tasks, shots and metrics of their code
        "paper": _suite(
            ("winogrande", 5, "acc"),
            ("hellaswag", 10, "acc_norm"),
            ("arc_challenge", 25, "acc_norm"),
            ("arc_easy", 0, "acc_norm"),
            ("piqa", 0, "acc"),
            ("boolq", 0, "acc"),
            ("truthfulqa_mc2", 0, "acc"),
            ("gsm8k", 5, "exact_match,strict-match"),
            ("mmlu", 5, "acc"),
            ("lambada_openai", 0, "acc"),
            ("mathqa", 0, "acc_norm"),
        ),
        # the seven tasks of Shen et al. 2024 (arXiv:2409.17372), after LLM-Pruner
        "shen7": _suite(
            ("boolq", 0, "acc"),
            ("piqa", 0, "acc"),
            ("hellaswag", 0, "acc_norm"),
            ("winogrande", 0, "acc"),
            ("arc_easy", 0, "acc"),
            ("arc_challenge", 0, "acc_norm"),
            ("openbookqa", 0, "acc_norm"),
        ),
    }
)
PREFERRED = ("acc_norm", "acc", "exact_match,strict-match", "exact_match")  # where a task has several


def asked_for(names: Sequence[str], shots: int | None = None) -> tuple[Asked, ...]:
    """Tasks by name, suites ("paper", "shen7") by their tasks; shots: instead of what they say."""
    found: dict[str, Asked] = {}
    for name in names:
        one = SUITES.get(name) or (Asked(name, 0, ""),)
        found |= {a.task: Asked(a.task, a.shots if shots is None else shots, a.metric) for a in one}
    if not found:
        raise UserError(f"no tasks were named; give tasks of lm-eval, or one of {', '.join(SUITES)}")
    return tuple(found.values())


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Asked],
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    skip: int = 0,
    batch: int = 8,
    seed: int = 0,
    each: bool = False,
    opened: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Accuracies of a model, with standard errors, as plain data.

    path: a folder of lm-eval task files; only those are read then, which needs no network where they name local data.
    limit: examples of each task at most (of each of MMLU's subjects). skip: examples that come before those; it needs
    a limit. advance is told the tasks that are done. each: with the score of every example ("each" of a task, None
    where lm-eval has a figure for all of them only), which two models can be compared by. opened: the data of
    these tasks was opened before (`refuse_few`).
    Returns {"tasks": [{task, value, se, metric, shots, n}], "mean", "mean_se", "limit"}; the standard error of the mean
    is that of independent tasks. Raises UserError for a missing package, folder, task or data, before the first forward
    where it can be known.
    """
    manager, groups = manager_of(asked, path), list(dict.fromkeys(a.shots for a in asked))
    if len(groups) > 1 and not opened:  # lm-eval would open the last group's data last
        refuse_few(asked, path, skip)
    from lm_eval.models.huggingface import HFLM

    with _tied_already(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found: dict[str, dict[str, Any]] = {}
    for shots in groups:
        own = [a for a in asked if a.shots == shots]
        raw = _evaluated(wrapped, own, shots, manager, (skip, limit), seed, each)
        found |= {a.task: _figure(raw, a, each) for a in own}
        advance(len(own))
    values = [one["value"] for one in found.values()]
    errors = [one["se"] for one in found.values()]
    return {
        "tasks": [{"task": a.task, **found[a.task]} for a in asked],
        "mean": sum(values) / len(values),
        "mean_se": math.sqrt(sum(e * e for e in errors)) / len(errors) if None not in errors else None,
        "limit": limit,
        "versions": machine.versions(*machine.JUDGING),
    }


@contextmanager
def _tied_already(model: Any) -> Iterator[None]:
    """Let nobody tie weights anew: lm-eval asks for it, and an active sub-network has views where parameters were."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights


def manager_of(asked: Sequence[Asked], path: str | Path | None = None) -> Any:
    """lm-eval's manager of the tasks that it knows; raises UserError where it is missing, or does not know one."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError("tasks need the package lm-eval; install it with pip install 'prunus[eval]'") from error
    if path is not None and not Path(path).is_dir():
        raise UserError(f"{str(path)!r} is no folder; give one of lm-eval task files with --tasks-path")
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = _manager(str(path) if path else None)
    known = set(manager.all_tasks)
    if unknown := [a.task for a in asked if a.task not in known]:
        where = f" in {str(path)!r}" if path else ""
        raise UserError(f"lm-eval knows no task {unknown[0]!r}{where}; {_some(unknown[0], known)}")
    return manager


@cache
def _manager(path: str | None) -> Any:
    """Reading the thousands of task files of lm-eval takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=path, include_defaults=path is None)


def task_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, path: str | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Zero-shot scores by task: {"score", "metric", "se", "n", "each"}, for tables of many networks."""
    found = evaluate_tasks(model, tokenizer, asked_for(tasks), path=path, limit=limit, each=True)["tasks"]
    return {
        row["task"]: {
            "score": row["value"], "metric": row["metric"].partition(",")[0],
            **{key: row[key] for key in ("se", "n", "each")},
        }
        for row in found
    }  # fmt: skip


def difference(
    own: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float] | None:
    """How much better one model's mean score is than another's on the same examples, and the standard error of that.

    own, other: what `task_scores` gave. Errors are those of paired examples and independent tasks; the models mostly
    succeed and fail together, so that they are smaller than those of two separate scores. None where the two have no
    tasks in common, or not the scores of every example.
    """
    both = [(own[name].get("each") or [], other[name].get("each") or []) for name in own if name in other]
    if not both or any(len(a) != len(b) or len(a) < 2 for a, b in both):
        return None
    gains = [[x - y for x, y in zip(a, b, strict=True)] for a, b in both]
    errors = [statistics.stdev(one) / math.sqrt(len(one)) for one in gains]
    return sum(statistics.fmean(one) for one in gains) / len(gains), math.hypot(*errors) / len(errors)


def _evaluated(
    wrapped: Any, asked: Sequence[Asked], shots: int, manager: Any, some: tuple[int, int | None], seed: int, each: bool
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    (skip, limit), names = some, [a.task for a in asked]
    with _readable(names):
        samples = _later(manager, names, skip, limit) if skip and limit else None
        raw = simple_evaluate(
            model=wrapped, tasks=names, num_fewshot=shots, task_manager=manager, limit=None if samples else limit,
            samples=samples, log_samples=each, bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    return dict(raw or {})


def refuse_few(asked: Sequence[Asked], path: str | Path | None, skip: int) -> None:
    """Raise UserError where a task cannot be read, or has no examples behind the first `skip`."""
    manager, names = manager_of(asked, path), [a.task for a in asked]
    with _readable(names):
        _later(manager, names, skip, 1)


@contextmanager
def _readable(names: Sequence[str]) -> Iterator[None]:
    """Inside the block, data that cannot be read raise UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "script" not in str(error):  # datasets runs none any more
            raise
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        hint = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "is the hub reachable?"
        text = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the data of {', '.join(names)} cannot be read ({text}); {hint} Give task files that name local data with "
            "--tasks-path"
        ) from error


def _later(manager: Any, names: list[str], skip: int, limit: int) -> dict[str, list[int]]:
    """The numbers of `limit` examples of every task after the first `skip`, by its own name (groups hold several)."""
    from lm_eval.tasks import get_task_dict

    def leaves(found: Mapping[Any, Any]) -> dict[str, Any]:
        own = {str(k): v for k, v in found.items() if not isinstance(v, Mapping)}
        for inner in (v for v in found.values() if isinstance(v, Mapping)):
            own |= leaves(inner)
        return own

    newer = hasattr(manager, "load")  # which returns the tasks of groups too
    found = manager.load(names)["tasks"] if newer else leaves(get_task_dict(names, manager))
    later = {}
    for name, task in found.items():
        n = len(task.eval_docs)
        if n <= skip:
            raise UserError(f"{name} has {n} examples, and the first {skip} are taken; give a lower limit of examples")
        later[name] = list(range(skip, min(n, skip + limit)))
    return later


def _figure(raw: Mapping[str, Any], one: Asked, each: bool) -> dict[str, Any]:
    """The figure of one task and its standard error, and where asked for, that of every example."""
    row: Mapping[str, Any] = raw["results"][one.task]
    there = [key for key, value in row.items() if isinstance(value, float) and "stderr" not in key]
    names = [m if "," in m else f"{m},none" for m in ((one.metric,) if one.metric else PREFERRED)]
    key = next((name for name in (*names, *(() if one.metric else there)) if name in row), None)
    if key is None:
        given = ", ".join(name.removesuffix(",none") for name in there) or "none"
        raise UserError(
            f"{one.task} has no figure {one.metric or 'at all'} (it has: {given}); name the task by itself for the "
            "figure that it has, or give task files that have this one with --tasks-path"
        )
    metric, _, how = key.partition(",")
    se = row.get(f"{metric}_stderr,{how}")
    counted = raw.get("n-samples", {}).get(one.task, {})
    n = counted.get("effective") if counted else sum(
        c["effective"] for name, c in raw.get("n-samples", {}).items() if name.startswith(f"{one.task}_")
    )  # fmt: skip
    return {
        "value": float(row[key]),
        "se": float(se) if isinstance(se, float) else None,
        "metric": key.removesuffix(",none"),
        "shots": int(raw.get("n-shot", {}).get(one.task, one.shots)),  # 0 where a task's file insists on it
        "n": n,
        **({"each": _each(raw["samples"], one.task, metric, how)} if each else {}),
    }


def _each(samples: Mapping[str, Any], task: str, metric: str, how: str) -> list[float] | None:
    """The metric of every example in the order of the data set; a group's subjects one after the other."""
    names = [task] if task in samples else sorted(name for name in samples if name.startswith(f"{task}_"))
    found = []
    for name in names:
        own = [one for one in samples[name] if one.get("filter", how) == how]
        found += [one.get(metric) for one in sorted(own, key=lambda one: int(one["doc_id"]))]
    return [float(x) for x in found] if found and all(isinstance(x, (bool, int, float)) for x in found) else None


def _some(asked: str, known: set[str], n: int = 12) -> str:
    """The nearest names, or else some of them."""
    if near := difflib.get_close_matches(asked, sorted(known), 3):
        return f"did you mean {' or '.join(near)}?"
    listed = sorted(known)
    return f"known are {', '.join(listed[:n])}" + (f" and {len(listed) - n} more" if len(listed) > n else "")


__all__ = ["SUITES", "Asked", "asked_for", "difference", "evaluate_tasks", "manager_of", "task_scores"]
