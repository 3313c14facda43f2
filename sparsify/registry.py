"""Passes and backends by name, found through entry points, so that other packages plug in without touching us.

Nothing is imported until it is asked for: ``sparsify --help`` stays fast.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparsify.errors import SpecError, near

# The package's own table. Entry points add to it; a checkout that was never installed still works.
_OWN = {
    "sparsify.passes": {
        "activation": "sparsify.passes.activation:Activation",
        "alps": "sparsify.passes.alps:ALPS",
        "apt": "sparsify.passes.apt:APT",
        "gblm": "sparsify.passes.gblm:GBLM",
        "gradient": "sparsify.passes.gradient:Gradient",
        "llm-pruner": "sparsify.passes.llm_pruner:LLMPruner",
        "magnitude": "sparsify.passes.magnitude:Magnitude",
        "sparsegpt": "sparsify.passes.sparsegpt:SparseGPT",
        "twin": "sparsify.passes.twin:Twin",
        "wanda": "sparsify.passes.wanda:Wanda",
    },
    "sparsify.backends": {
        "cuda": "sparsify.backends.cuda.backend:CudaBackend",
        "hf": "sparsify.backends.hf:HuggingFace",
        "onnx": "sparsify.backends.onnx.backend:ONNX",
        "packed": "sparsify.backends.packed.backend:PackedBackend",
    },
    # Functions with typer's annotations; each is imported when a command line is parsed, so they import nothing heavy.
    "sparsify.commands": {
        "tune": "sparsify.tune_command:tune",
        "run": "sparsify.backends.onnx.commands:run",
        "verify": "sparsify.backends.onnx.commands:verify",
        "expand": "sparsify.backends.onnx.commands:expand",
        "unpack": "sparsify.backends.packed.commands:unpack",
        "bench": "sparsify.backends.packed.commands:bench",
    },
    # Loading one registers it with transformers.
    "sparsify.quantizers": {"sparsify": "sparsify.backends.packed.quantizer:SparsifyQuantizer"},
}


def registered(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group (``sparsify.passes``, ``sparsify.backends``, …) by name, unloaded."""
    own = {name: EntryPoint(name, value, group) for name, value in _OWN[group].items()}
    return {entry.name: entry for entry in entry_points(group=group)} | own


def find(group: str, name: str) -> Any:
    """Load what ``name`` stands for in ``group``.

    Raises:
        SpecError: nothing of that name is registered.
    """
    known = registered(group)
    if name not in known:
        kind = group.rpartition(".")[2].removesuffix("s").removesuffix("e")
        raise SpecError(
            f"{'pass' if kind == 'pass' else 'backend'} '{name}'",
            found="nothing of that name is registered",
            do=near(name, known),
        )
    return known[name].load()
