"""Making transformers know lowbit's quantizer once both are there, without importing transformers to say so.

transformers takes seconds to import, which `import lowbit_hf` and `lowbit schemes` must not. So the quantizer is
registered at once where transformers' table of quantizers is loaded, and else right after it will be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantizer now, or when transformers' table of quantizers is imported."""
    if _TABLE in sys.modules:
        _load()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _load() -> None:
    import_module("lowbit_hf.quantizer")


class _Watch(MetaPathFinder):
    """Waits for one module, and finds it as it would have been found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads a module as another loader does, gives it back to that one, and registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _load()
