"""Making transformers know lowbit's quantizer and attention, without importing transformers to say so.

transformers takes seconds to import, which `import lowbit_hf` and `lowbit schemes` must not. So each is registered at
once where transformers' module with the table for it is loaded, and else right after it will be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Modules of ours that register something when they are imported, by the module that has the table for it.
_HOMES = {
    "transformers.quantizers.auto": "lowbit_hf.quantizer",
    "transformers.modeling_utils": "lowbit_hf.attention",
}


def register() -> None:
    """Register the quantizer and attention now, or when transformers' tables are imported."""
    for table, home in _HOMES.items():
        if table in sys.modules:
            import_module(home)
        elif not any(isinstance(finder, _Watch) and finder.table == table for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch(table))


class _Watch(MetaPathFinder):
    """Waits for one module, and finds it as it would have been found."""

    def __init__(self, table: str) -> None:
        self.table = table

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.table:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, _HOMES[self.table])
        return spec


class _Then(Loader):
    """Loads a module as another loader does, gives it back to that one, and imports ours."""

    def __init__(self, loader: Loader, home: str) -> None:
        self._loader, self._home = loader, home

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        import_module(self._home)
