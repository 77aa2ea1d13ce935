"""Prunus finds the smaller networks inside a pretrained language model.

The verbs, each a function: `compress`, `step`, `load`, `score`, `sort`, `activate`, `extract`, `save`, `evaluate`,
`check`, `pick`. Importing this package imports neither torch nor transformers; a verb does when it is first used. From
then on (or from when the caller imports transformers) checkpoints of Prunus load without `trust_remote_code`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunus import registration
from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

if TYPE_CHECKING:
    from prunus.checkpoint import save
    from prunus.evaluation import evaluate
    from prunus.families import dims, family_of, full
    from prunus.importance import score
    from prunus.loading import load
    from prunus.picking import pick
    from prunus.pipeline import compress, step
    from prunus.rows import check
    from prunus.slicing import activate, extract, sort

_VERBS = {
    "activate": "slicing",
    "check": "rows",
    "compress": "pipeline",
    "dims": "families",
    "evaluate": "evaluation",
    "extract": "slicing",
    "family_of": "families",
    "full": "families",
    "load": "loading",
    "pick": "picking",
    "save": "checkpoint",
    "score": "importance",
    "sort": "slicing",
    "step": "pipeline",
}
__all__ = [
    "CompressConfig",
    "LayerKept",
    "LayerShape",
    "SubNetwork",
    "UserError",
    "activate",
    "check",
    "compress",
    "dims",
    "evaluate",
    "extract",
    "family_of",
    "full",
    "load",
    "pick",
    "save",
    "score",
    "sort",
    "step",
]

registration.install()


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}")
    return getattr(import_module(f"prunus.{_VERBS[name]}"), name)
