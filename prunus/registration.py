"""Floor 0: once transformers' auto classes are loaded, teach them ours; importing `prunus` alone loads nothing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Register the ragged classes now if transformers' auto classes are loaded, else as soon as they are."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    if "prunus.ragged" not in sys.modules:  # else it is being imported, and registers its classes when it is done
        importlib.import_module("prunus.ragged")


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the others find the auto classes, and adds ours behind them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(importlib.abc.Loader):
    """A loader that registers our classes after its work is done."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
