"""Prunus finds the smaller networks inside a pretrained language model.

The verbs, each a function: `compress`, `step`, `load`, `score`, `sort`, `activate`, `extract`, `save`, `evaluate`,
`check`, `pick`, `export`, `recover`, `latency`, `bench`. Importing this package imports neither torch nor transformers;
a verb does when it is first used. From then on (or from when the caller imports transformers) checkpoints of Prunus
load without `trust_remote_code`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunus.config import CompressConfig
from prunus.errors import UserError
from prunus.machine import VERSION
from prunus.models import registration
from prunus.subnetwork import LayerKept, LayerShape, SubNetwork

if TYPE_CHECKING:
    from prunus.baselines.bench import run as bench
    from prunus.evaluation import evaluate
    from prunus.exporting.export import export
    from prunus.inspection import inspect_latency as latency
    from prunus.models.checkpoint import save
    from prunus.models.families import dims, family_of, full
    from prunus.models.loading import load
    from prunus.models.rows import check
    from prunus.models.slicing import activate, extract, sort
    from prunus.picking import pick
    from prunus.pipeline import compress, step
    from prunus.scoring.importance import score
    from prunus.training.recovery import recover

__version__ = VERSION
_VERBS = {  # where each is; after a colon, what it is called there
    "activate": "models.slicing",
    "bench": "baselines.bench:run",
    "check": "models.rows",
    "compress": "pipeline",
    "dims": "models.families",
    "evaluate": "evaluation",
    "export": "exporting.export",
    "extract": "models.slicing",
    "family_of": "models.families",
    "full": "models.families",
    "latency": "inspection:inspect_latency",
    "load": "models.loading",
    "pick": "picking",
    "recover": "training.recovery",
    "save": "models.checkpoint",
    "score": "scoring.importance",
    "sort": "models.slicing",
    "step": "pipeline",
}
__all__ = [
    "CompressConfig",
    "LayerKept",
    "LayerShape",
    "SubNetwork",
    "UserError",
    "activate",
    "bench",
    "check",
    "compress",
    "dims",
    "evaluate",
    "export",
    "extract",
    "family_of",
    "full",
    "latency",
    "load",
    "pick",
    "recover",
    "save",
    "score",
    "sort",
    "step",
]

registration.install()


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}")
    module, _, known_as = _VERBS[name].partition(":")
    return getattr(import_module(f"prunus.{module}"), known_as or name)
