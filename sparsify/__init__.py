"""sparsify: a model-graph compiler over torch.fx that prunes large language models post-training.

``compile`` prunes, ``evaluate`` measures; :mod:`sparsify.passes` holds the methods. Names are loaded when first used,
so that importing the package (and ``sparsify --help``) does not import torch. Importing it also teaches transformers to
load packed folders.
"""

from sparsify.import_path import by_module, leave_working_directory

# Before anything else is imported: python -m puts the working directory before the standard library.
if by_module():
    leave_working_directory()

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsify.transformers_hook import register_with_transformers

if TYPE_CHECKING:
    from sparsify.comparing.diff import diff
    from sparsify.comparing.difference import Difference
    from sparsify.compiler.pipeline import compile
    from sparsify.compiler.result import Compiled
    from sparsify.context import Progress
    from sparsify.errors import SparsifyError
    from sparsify.evaluation.evaluate import evaluate
    from sparsify.frontend.materialize import load
    from sparsify.method.spec import parse_pass
    from sparsify.method.weight_pass import Pruned, WeightPass
    from sparsify.prune.fx_pass import GraphPrune
    from sparsify.quality.evaluation import Evaluation
    from sparsify.reporting.report import report
    from sparsify.runtime.cpu.onnx_library import onnx_library
    from sparsify.searching.costs import Sensitivity
    from sparsify.searching.found import Found
    from sparsify.searching.search import search
    from sparsify.searching.sensitivity import sensitivity
    from sparsify.tuning.hold import HoldZeros, hold_zeros
    from sparsify.world.joining import join
    from sparsify.world.world import World

__all__ = [
    "Compiled", "Difference", "Evaluation", "Found", "GraphPrune", "HoldZeros", "Progress", "Pruned", "Sensitivity",
    "SparsifyError", "WeightPass", "World", "compile", "diff", "evaluate", "hold_zeros", "join", "load",
    "onnx_library", "parse_pass", "report", "search", "sensitivity",
]  # fmt: skip


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for the module ``package``, whose names are loaded when they are first asked for.

    Args:
        homes: name to the module, relative to ``package``, that defines it; its own name for a module.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module = import_module(f"{package}.{homes[name]}")
        return module if homes[name] == name else getattr(module, name)

    return load


__getattr__ = lazily(
    __name__,
    {
        "Compiled": "compiler.result",
        "Difference": "comparing.difference",
        "Evaluation": "quality.evaluation",
        "Found": "searching.found",
        "GraphPrune": "prune.fx_pass",
        "HoldZeros": "tuning.hold",
        "Progress": "context",
        "Pruned": "method.weight_pass",
        "Sensitivity": "searching.costs",
        "SparsifyError": "errors",
        "WeightPass": "method.weight_pass",
        "World": "world.world",
        "join": "world.joining",
        "backends": "backends",
        "compile": "compiler.pipeline",
        "diff": "comparing.diff",
        "evaluate": "evaluation.evaluate",
        "hold_zeros": "tuning.hold",
        "load": "frontend.materialize",
        "onnx_library": "runtime.cpu.onnx_library",
        "parse_pass": "method.spec",
        "passes": "passes",
        "report": "reporting.report",
        "search": "searching.search",
        "sensitivity": "searching.sensitivity",
    },
)

register_with_transformers()
