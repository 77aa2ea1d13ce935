"""Floor 0: once transformers is imported, teach its auto classes ours; importing `prunus` alone loads nothing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# the package and none of its modules: our classes import many of those, and one that is half imported would break them
PACKAGE = "transformers"


def install() -> None:
    """Register the classes of ours now if transformers is imported, else as soon as it is."""
    if PACKAGE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    for name in ("prunus.models.ragged", "prunus.models.sliced"):
        if name not in sys.modules:  # else it is being imported, and registers its classes when it is done
            importlib.import_module(name)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the others find transformers, and adds our classes behind it."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != PACKAGE or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


class _Then(importlib.abc.Loader):
    """A loader that registers our classes after its work is done."""

    def __init__(self, loader: importlib.abc.Loader, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.watch in sys.meta_path:  # only now: others look for the package without importing it
            sys.meta_path.remove(self.watch)
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()
