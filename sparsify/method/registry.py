"""Passes and backends by name, found through entry points, so that other packages plug in without touching us.

Nothing is imported until it is asked for: ``sparsify --help`` stays fast. A package that is broken is named in a
warning, and costs what it would have brought and nothing else.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
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
        "permute": "sparsify.passes.permute:Permute",
        "refine": "sparsify.passes.refine:Refine",
        "round": "sparsify.passes.round:Round",
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
        "compile": "sparsify.cli.compile:compile_command",
        "inspect": "sparsify.cli.commands:inspect_command",
        "eval": "sparsify.cli.evaluating.command:eval_command",
        "compare": "sparsify.cli.commands:compare_command",
        "clean": "sparsify.cli.commands:clean_command",
        "search": "sparsify.cli.searching.command:search_command",
        "sensitivity": "sparsify.cli.searching.command:sensitivity_command",
        "report": "sparsify.cli.commands:report_command",
        "diff": "sparsify.cli.commands:diff_command",
        "passes": "sparsify.cli.passes:passes_command",
        "version": "sparsify.cli.commands:version_command",
        "tune": "sparsify.cli.tune:tune_command",
        "run": "sparsify.backends.onnx.commands:run",
        "verify": "sparsify.backends.verify.commands:verify",
        "expand": "sparsify.backends.onnx.commands:expand",
        "unpack": "sparsify.backends.packed.commands:unpack",
        "bench": "sparsify.backends.bench.commands:bench",
        "serve": "sparsify.backends.serve.commands:serve",
    },
    # Functions from a model folder and its ledger to a store that reads it as if it were dense; None where it is not of
    # their kind.
    "sparsify.stores": {
        "packed": "sparsify.backends.packed.store:open_packed",
        "onnx": "sparsify.backends.onnx.storage.reader:open_folder",
    },
    # Functions from a file or folder and its ledger to a store of what it holds, where that is no checkpoint.
    "sparsify.readers": {"onnx": "sparsify.backends.onnx.storage.reader:open_graph"},
    # Functions from a folder to what runs it where torch does not, for evaluation; None where it is not of their kind.
    "sparsify.runtimes": {"onnx": "sparsify.backends.onnx.running.forward:open_forward"},
    # Loading one registers it with transformers.
    "sparsify.quantizers": {"sparsify": "sparsify.backends.packed.loaded.quantizer:SparsifyQuantizer"},
}


# What one thing of a group is called.
_KINDS = {
    "sparsify.passes": "pass",
    "sparsify.backends": "backend",
    "sparsify.commands": "command",
    "sparsify.quantizers": "quantizer",
    "sparsify.runtimes": "runtime",
    "sparsify.stores": "store",
    "sparsify.readers": "reader",
}


def entry_points(group: str) -> list[EntryPoint]:
    """Those of ``group`` of every installed package whose own facts can be read, by the names of packages."""
    found, unread = _installed(tuple((path, _changed(path)) for path in sys.path))
    for said in unread:
        _warn(said)
    return [entry for entry in found if entry.group == group]


# A hundred packages take 5 ms to read, and every spec asks for its pass.
@lru_cache(maxsize=4)
def _installed(places: tuple[tuple[str, int], ...]) -> tuple[list[EntryPoint], list[str]]:
    """Entry points of our groups by the names of packages, and what is to be said of packages that cannot be read.

    Args:
        places: the import path, which is read, and when each of it last got or lost a package.
    """
    found: dict[str, list[EntryPoint]] = {}
    unread = []
    for number, distribution in enumerate(distributions()):
        try:
            entries = [entry for entry in distribution.entry_points if entry.group in _OWN]
            # Its name is in another file, and few of a hundred packages bring anything. Of two of one name on the
            # import path the first would be imported.
            if entries:
                found.setdefault(str(distribution.metadata["Name"] or number), entries)
        except Exception as error:  # whatever reading a broken file raises
            where = getattr(distribution, "_path", "an installed package")
            unread.append(f"the facts of {str(where)!r} cannot be read ({_cause(error)}); what it brings is left out")
    return [entry for name in sorted(found) for entry in found[name]], unread


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


def registered(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group (``sparsify.passes``, ``sparsify.backends``, …) by name, unloaded.

    A name of ours stays ours. Of two packages that bring one name, the first by the alphabet has it.
    """
    found = {name: EntryPoint(name, value, group) for name, value in _OWN[group].items()}
    own = set(found)
    for entry in entry_points(group=group):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            whose = "sparsify's own" if entry.name in own else f"that of {package_of(first)}"
            _warn(
                f"{package_of(entry)} brings a {_KINDS[group]} {entry.name!r} too ({entry.value}), which is left out: "
                f"{whose} is used"
            )
    return found


def loaded(group: str, only: str | None = None) -> Iterator[tuple[str, EntryPoint, Any]]:
    """Name, entry point and what it stands for, of everything in ``group`` that loads (or of ``only`` one); a warning
    names what does not.

    Raises:
        SpecError: something of our own does not load.
    """
    for name, entry in registered(group).items():
        if only not in (None, name):
            continue
        try:
            value = load(entry)
        except SpecError as error:
            if name in _OWN[group]:
                raise
            warn_of(entry, error.found)
            continue
        yield name, entry, value


def is_own(entry: EntryPoint) -> bool:
    """Whether it is sparsify's, not another package's."""
    return _OWN[entry.group].get(entry.name) == entry.value


def package_of(entry: EntryPoint) -> str:
    """Which package brings ``entry``, for people."""
    distribution = getattr(entry, "dist", None)
    try:
        return f"the package {distribution.metadata['Name']!r}" if distribution else f"the module {entry.module!r}"
    except Exception:  # its facts are broken
        return f"the module {entry.module!r}"


def warn_of(entry: EntryPoint, found: str) -> None:
    """Say that what a package of somebody's brings is left out."""
    _warn(f"{_KINDS[entry.group]} {entry.name!r} is left out: {found}")


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
    return load(known(group, name))


def load(entry: EntryPoint) -> Any:
    """What ``entry`` stands for.

    Raises:
        SpecError: it does not load.
    """
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # somebody's module may do anything, exit included
        raise SpecError(
            f"{_KINDS[entry.group]} '{entry.name}'",
            found=f"its entry point {entry.value} does not load ({_cause(error)}); {package_of(entry)} brings it",
            do="Mend or remove that package",
        ) from error


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
