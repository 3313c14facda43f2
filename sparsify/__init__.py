"""sparsify: a model-graph compiler over torch.fx that prunes large language models post-training.

``compile`` is the whole of it; :mod:`sparsify.passes` holds the methods. Names are loaded when first used, so that
importing the package (and ``sparsify --help``) does not import torch. Importing it also teaches transformers to load
packed folders.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsify.integration import register_with_transformers

if TYPE_CHECKING:
    from sparsify.compiler import Compiled, compile
    from sparsify.errors import SparsifyError
    from sparsify.evaluate import perplexity
    from sparsify.ragged import load
    from sparsify.spec import parse_pass
    from sparsify.weight_pass import Pruned, WeightPass

__all__ = ["Compiled", "Pruned", "SparsifyError", "WeightPass", "compile", "load", "parse_pass", "perplexity"]

_HOME = {
    "Compiled": "compiler",
    "compile": "compiler",
    "load": "ragged",
    "SparsifyError": "errors",
    "parse_pass": "spec",
    "perplexity": "evaluate",
    "Pruned": "weight_pass",
    "WeightPass": "weight_pass",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"sparsify.{_HOME[name]}"), name)
    if name in ("passes", "backends"):
        return import_module(f"sparsify.{name}")
    raise AttributeError(f"module 'sparsify' has no attribute '{name}'")


register_with_transformers()
