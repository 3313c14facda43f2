"""``import sparsify`` teaches transformers to load packed folders, without importing transformers (or torch) itself.

Where transformers' quantizers are there already they are told at once; else when they are first imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Add ``quant_method: sparsify`` to transformers, now or as soon as it is imported; again does nothing."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from sparsify.errors import SpecError
    from sparsify.method.registry import is_own, load, registered, warn_of

    for entry in registered("sparsify.quantizers").values():
        # One that is being imported already, and so imported transformers, registers itself when it gets there.
        if entry.module in sys.modules:
            continue
        try:
            load(entry)
        except SpecError as error:
            if is_own(entry):
                raise
            warn_of(entry, error.found)


class _Finder(MetaPathFinder):
    """Waits for one import, lets the usual finders do it, and registers when it is done."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
