"""Passes and backends by name, found through entry points, so that other packages plug in without touching us.

Nothing is imported until it is asked for: ``sparsify --help`` stays fast.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparsify.errors import SpecError, first_line, near

# The package's own table; entry points add to it; a checkout that was never installed still works.
_OWN = {
    "sparsify.passes": {
        "activation": "sparsify.passes.activation:Activation",
        "alps": "sparsify.passes.alps:ALPS",
        "apt": "sparsify.passes.apt:APT",
        "gblm": "sparsify.passes.gblm:GBLM",
        "gradient": "sparsify.passes.gradient:Gradient",
        "llm-pruner": "sparsify.passes.llm_pruner:LLMPruner",
        "lower-sparse": "sparsify.passes.lowering.lower_sparse:LowerSparse",
        "magnitude": "sparsify.passes.magnitude:Magnitude",
        "sparsegpt": "sparsify.passes.sparsegpt:SparseGPT",
        "twin": "sparsify.passes.twin:Twin",
        "wanda": "sparsify.passes.wanda:Wanda",
    },
    "sparsify.backends": {
        "cuda": "sparsify.backends.cuda.backend:CudaBackend",
        "hf": "sparsify.backends.hf.backend:HuggingFace",
        "onnx": "sparsify.backends.onnx.backend:ONNX",
        "packed": "sparsify.backends.packed.backend:PackedBackend",
    },
    # Functions with typer's annotations; each is imported when a command line is parsed, so they import nothing heavy.
    "sparsify.commands": {
        "compile": "sparsify.cli.commands:compile_command",
        "inspect": "sparsify.cli.commands:inspect_command",
        "eval": "sparsify.cli.commands:eval_command",
        "compare": "sparsify.cli.commands:compare_command",
        "passes": "sparsify.cli.commands:passes_command",
        "tune": "sparsify.cli.tune:tune_command",
        "run": "sparsify.backends.onnx.commands:run",
        "verify": "sparsify.backends.verify.commands:verify",
        "expand": "sparsify.backends.onnx.commands:expand",
        "unpack": "sparsify.backends.packed.commands:unpack",
        "bench": "sparsify.backends.packed.commands:bench",
    },
    # Functions from a model folder and its ledger to a store that reads it as if it were dense; None where it is not of
    # their kind.
    "sparsify.stores": {"packed": "sparsify.backends.packed.store:open_packed"},
    # Loading one registers it with transformers.
    "sparsify.quantizers": {"sparsify": "sparsify.backends.packed.loaded.quantizer:SparsifyQuantizer"},
}


# What one thing of a group is called.
_KINDS = {
    "sparsify.passes": "pass",
    "sparsify.backends": "backend",
    "sparsify.commands": "command",
    "sparsify.quantizers": "quantizer",
    "sparsify.stores": "store",
}


def registered(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group (``sparsify.passes``, ``sparsify.backends``, …) by name, unloaded."""
    own = {name: EntryPoint(name, value, group) for name, value in _OWN[group].items()}
    return {entry.name: entry for entry in entry_points(group=group)} | own


def known(group: str, name: str) -> EntryPoint:
    """What ``name`` stands for in ``group``, unloaded.

    Raises:
        SpecError: nothing of that name is registered.
    """
    entries = registered(group)
    if name not in entries:
        raise SpecError(f"{_KINDS[group]} '{name}'", found="nothing of that name is registered", do=near(name, entries))
    return entries[name]


def find(group: str, name: str) -> Any:
    """Load what ``name`` stands for in ``group``.

    Raises:
        SpecError: nothing of that name is registered, or it does not load.
    """
    entry = known(group, name)
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"{_KINDS[group]} '{name}'",
            found=f"its entry point {entry.value} does not load ({type(error).__name__}: {first_line(error)})",
            do="Mend or remove the package that brings it",
        ) from error
