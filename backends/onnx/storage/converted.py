"""Parameters that transformers makes of a checkpoint's tensors by other means than names: the graph makes them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from sparsify.backends.onnx.storage.builder import Builder
from sparsify.errors import BackendError
from sparsify.ir.weights import Conversion

# Values that belong together by their pattern: experts, one after the other; or one value.
Part: TypeAlias = "ir.Value | list[ir.Value]"


def convert(
    build: Builder, parameter: str, conversion: Conversion, parts: Sequence[Sequence[ir.Value]], wanted: ir.DataType
) -> ir.Value:
    """The value of ``parameter``.

    Args:
        parts: the checkpoint's tensors in the dtype ``wanted``, those of one pattern together; patterns are in the
            converter's order.

    Raises:
        BackendError: transformers does what is not expressed here.
    """
    current: list[Part] = [list(part) for part in parts]
    targets = list(conversion.targets)
    for operation in conversion.converter.operations:
        made = _apply(build, parameter, operation, current, targets, conversion.shapes, wanted)
        if made is None:
            break
        current, targets = made
    else:
        values = _flat(current)
        if len(values) == 1 and len(targets) == 1 and _sizes(values[0]) == list(conversion.shapes[parameter]):
            return values[0]
    kinds = [type(o).__name__ for o in conversion.converter.operations]
    raise BackendError(
        f"exporting {parameter} to ONNX",
        found=f"transformers makes it from {len(conversion.sources)} tensors by {', '.join(kinds)}, "
        "which is not expressed in the graph",
        do="Save the model again with this version of transformers, then export that folder",
    )


def _apply(
    build: Builder,
    parameter: str,
    operation: object,
    current: Sequence[Part],
    targets: list[str],
    shapes: Mapping[str, Sequence[int]],
    wanted: ir.DataType,
) -> tuple[list[Part], list[str]] | None:
    """What an operation makes of ``current``, and of which parameters that is all; None where it is unknown."""
    kind, axis = type(operation).__name__, getattr(operation, "dim", 0)
    lists = [part for part in current if isinstance(part, list)]
    if kind == "MergeModulelist" and axis == 0 and len(lists) == len(current):
        return [build.stack(f"{parameter}/{i}", part, wanted) for i, part in enumerate(lists)], targets
    if kind == "Concatenate":
        return [build.concat(f"{parameter}/joined", _flat(current), axis, wanted)], targets
    values = _flat(current)
    if len(values) != 1:
        return None
    if kind == "Transpose":
        if getattr(operation, "check_dims", False) and _sizes(values[0]) == list(shapes[parameter]):
            # Files of this model's experts are of both kinds, and transformers turns those that do not fit.
            return [values[0]], targets
        return [build.swapped(f"{parameter}/turned", values[0], operation.dim0, operation.dim1, wanted)], targets  # type: ignore[attr-defined]
    if kind in ("Chunk", "Split") and parameter in targets and all(target in shapes for target in targets):
        # Pieces of equal sizes, or of their parameters' own.
        sizes = [shapes[target][axis] for target in targets]
        at = targets.index(parameter)
        start = sum(sizes[:at])
        return [build.piece(f"{parameter}/piece", values[0], axis, start, start + sizes[at], wanted)], [parameter]
    return None


def _flat(parts: Sequence[Part]) -> list[ir.Value]:
    return [value for part in parts for value in (part if isinstance(part, list) else [part])]


def _sizes(value: ir.Value) -> list[int]:
    return [int(size) for size in value.shape or ()]
