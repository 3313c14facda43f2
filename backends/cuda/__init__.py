"""2:4 models on NVIDIA GPUs: what ``--to cuda`` writes, and how a loaded packed model takes its GPU's layouts.

The kernels, layouts and tables are :mod:`sparsify.runtime.cuda`; the folder and its modules are those of the backend
``packed``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.backends.packed.loaded.prepare import Prepared, prepare

__all__ = ["Prepared", "prepare"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("sparsify.backends.packed.loaded.prepare"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
