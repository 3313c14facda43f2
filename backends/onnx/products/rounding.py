"""Weights of plain products rounded to the nearest values of a grid of few bits, where the export is asked to."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sparsify.backends.onnx.products.packing import zeros_of
from sparsify.backends.onnx.products.sparse import is_turned, reading_products
from sparsify.backends.packed.choosing import PRUNED
from sparsify.backends.packed.grids import Values
from sparsify.backends.packed.plan import rounded_by_default
from sparsify.errors import Refused
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights


def round_products(
    values: Values, program: Program, parameters: Mapping[str, ir.Value], weights: Weights, prefix: str = "model."
) -> list[float]:
    """Round what a pass rounds by default and whatever was pruned, where the graph multiplies with it plainly.

    Args:
        parameters: by their names in the graph, behind ``prefix``; ``weights``: those of the output.

    Returns:
        ‖ΔW‖/‖W‖ of each that was rounded.
    """
    usual, lost = rounded_by_default(program), []
    for name, value in parameters.items():
        parameter, nodes = weights.canonical(name.removeprefix(prefix)), reading_products(value)
        if not nodes or parameter not in weights or weights.conversion(parameter) is not None:
            continue
        weight = weights.read(parameter)
        matrix = weight if is_turned(nodes[0]) else weight.t()
        if values.held(matrix) is not None or not (parameter in usual or zeros_of(matrix) >= PRUNED):
            continue
        rounded = values.rounded(matrix)
        if isinstance(rounded, Refused):
            continue
        lost.append(float((rounded.float() - matrix.float()).norm() / matrix.float().norm().clamp(min=1e-30)))
        weights.write(parameter, (rounded if is_turned(nodes[0]) else rounded.t()).contiguous())
    return lost
