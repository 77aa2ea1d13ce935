"""Floor 3: zero-shot and few-shot tasks of lm-eval on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from prunus.errors import UserError

PREFERRED = ("acc_norm,none", "acc,none", "exact_match,strict-match", "mc2,none")
BATCH = 8


def task_scores(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, path: str | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Score of every task: {"score", "metric", "se", "n"}; acc_norm where a task has it.

    path: a directory of task files, the only ones that are looked at then. limit: the first so many documents of each.
    Raises UserError where lm-eval is missing or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("tasks need lm-eval; install it with pip install 'prunus[eval]'") from error
    manager = TaskManager(include_path=path, include_defaults=path is None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    found = simple_evaluate(
        model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=100, log_samples=False
    )
    out = {}
    for name in tasks:
        values = found["results"][name]
        metric = next((m for m in PREFERRED if m in values), None)
        if metric is None:
            raise UserError(f"the task {name!r} has none of the metrics {', '.join(PREFERRED)}; choose another task")
        base, _, kind = metric.partition(",")
        counted = found.get("n-samples", {}).get(name, {}).get("effective")
        out[name] = {"score": values[metric], "metric": base, "se": values.get(f"{base}_stderr,{kind}"), "n": counted}
    return out
