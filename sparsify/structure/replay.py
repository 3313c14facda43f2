"""The list of cuts that ``sparsify.json`` holds, made again from the dense checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from sparsify.files.staging import Staging
from sparsify.frontend.source import Source, open_source
from sparsify.ir.weights import Weights
from sparsify.structure import layers
from sparsify.structure.folder import write_files, write_tensors
from sparsify.structure.shrink import CutStore


def replay(dense: str | Path, cuts: Sequence[Mapping[str, Any]], into: Path, config: Mapping[str, Any]) -> Path:
    """Cut the dense checkpoint by the list that ``sparsify.json`` holds: the pruned one again, bit for bit.

    Args:
        cuts: ``structure[i]["cuts"]``. config: ``structure[i]["config"]``. into: a folder that is not there yet.

    Raises:
        BackendError: ``into`` is there, or cannot be written. CheckpointError: no such checkpoint.
    """
    source = open_source(dense)
    with Staging(into, source=source.folder) as staging:
        write_cut(source, cuts, staging.folder, config)
        return staging.commit()


def write_cut(source: Source, cuts: Sequence[Mapping[str, Any]], into: Path, config: Mapping[str, Any]) -> None:
    """The smaller model of ``source`` in the folder ``into``, by what :func:`replay` takes."""
    gone = layers.removed_of(cuts)
    if gone is not None:
        write_tensors(source, lambda: layers.stored_without(source.weights, *gone), config, into)
        return
    kept: dict[str, dict[int, Any]] = {}
    for cut in cuts:
        for name, axis, positions in cut["members"]:
            kept.setdefault(str(name), {})[int(axis)] = numpy.asarray(positions)
    weights = Weights(CutStore(source.weights, kept), {n: n for n in source.weights.parameters()})
    write_files(source, weights, source.weights, config, into)
