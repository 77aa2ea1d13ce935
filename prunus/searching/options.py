"""Floor 0: the settings of a front, a section of `config.py`'s configuration, and what a storage may be; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from prunus.errors import UserError
from prunus.setting import Section, setting

Axis = Literal["kl", "perplexity", "loss", "accuracy", "parameters", "flops", "bytes", "latency"]
MEASURED: tuple[Axis, ...] = ("kl", "perplexity", "loss", "accuracy")  # by running a candidate; others are computed
TITLES: dict[Axis, str] = {  # what stands on an axis; all are minimised
    "kl": "KL to the dense model (nats per token)",
    "perplexity": "perplexity of calibration text",
    "loss": "validation loss (nats per token)",
    "accuracy": "task error (1 - mean accuracy)",
    "parameters": "parameters",
    "flops": "FLOPs of a forward",
    "bytes": "bytes of the weights",
    "latency": "ms of a request, by the table",
}


@dataclass(frozen=True)
class FrontConfig(Section):
    """A front: networks of which none is better than another in everything that counts."""

    prefix: ClassVar[str] = "front."
    objectives: tuple[Axis, ...] = setting(
        (), "two or three of these to minimise together, over all sizes; none: no front", step="front", flag="front"
    )
    method: Literal["levels", "nsga2", "tpe", "local"] = setting(
        "levels", "what searches the front: level switches at every size, samplers of Optuna, or Pareto local search",
        step="front", flag="front-method",
    )  # fmt: skip
    evaluations: int = setting(
        200, "networks that are judged, and as many again for the random-search control", step="front",
        flag="front-evaluations", low=2,
    )  # fmt: skip
    population: int = setting(20, "networks of a generation, which several processes share", step="front", low=2)
    least: float = setting(
        0.4, "the smallest networks of the front, as a share of the dense model by its first computed objective",
        step="front", flag="front-least", above=0, high=0.99,
    )  # fmt: skip
    tasks: tuple[str, ...] = setting(
        (), "tasks of lm-eval, or a suite, for the objective `accuracy`; never those that you will report",
        step="front", flag="front-tasks",
    )  # fmt: skip
    task_limit: int = setting(
        50, "questions of each task that a candidate answers; the front answers as many others", step="front", low=1
    )
    tasks_path: str | None = setting(None, "folder of lm-eval task files; only these are read then", step="front")

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.objectives
        if not asked:
            return
        if len(set(asked)) != len(asked) or not 2 <= len(asked) <= 3:
            raise UserError(f"front.objectives are two or three different ones, as in kl,latency; given {_text(asked)}")
        if not set(asked) & set(MEASURED):
            raise UserError(
                f"front.objectives {_text(asked)} are all costs, of which the smallest network has the least; give one "
                f"of {', '.join(MEASURED)} too"
            )
        if "accuracy" in asked and not self.tasks:
            raise UserError("front.objectives names accuracy, but no tasks; give --front-tasks NAMES")


def check_storage(storage: str | None) -> None:
    """Raise UserError for a storage that is neither a database's URL nor a journal file, or that tells a password."""
    if storage is None or ("://" not in storage and storage.endswith(".journal")):
        return
    scheme, colon, rest = storage.partition("://")
    if not colon or not scheme or (not rest and not scheme.startswith("sqlite")):
        raise UserError(
            "search.storage is the URL of a database (sqlite:////shared/trials.db, postgresql://user@host/name), or a "
            f"file that ends in .journal; given {storage!r}"
        )
    if scheme.startswith("sqlite") and rest.strip("/") in ("", ":memory:"):
        raise UserError(
            "search.storage names no file: the study would lie in this process's memory, which nobody shares and "
            f"a stop loses; write it as sqlite:////shared/trials.db; given {storage!r}"
        )
    try:
        password = urlsplit(storage).password
    except ValueError:
        return  # SQLAlchemy says what is wrong with it
    if password and not password.startswith("$"):
        raise UserError(
            "search.storage would be written into the run with its password; write ${NAME} in its place, and put the "
            "password into the environment variable NAME (or leave it out, and use the database's own password file)"
        )


def _text(names: tuple[str, ...]) -> str:
    return ", ".join(names)


__all__ = ["MEASURED", "TITLES", "Axis", "FrontConfig", "check_storage"]
