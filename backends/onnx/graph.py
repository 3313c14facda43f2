"""From an ExportedProgram to an ONNX graph whose parameters keep their names and layouts.

The optimiser would fold, merge, transpose and rename weights. It never sees them here: while it runs every parameter
is a graph input, so no byte of a weight is needed, and what comes out has the parameters that went in.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript import opset18 as op
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass, onnx_fusions
from onnxscript.rewriter.rules import common as rules

from sparsify.backends.onnx.broadcast import spread_attention, spread_masks, stretch_rotations
from sparsify.backends.onnx.options import Linear
from sparsify.backends.onnx.tracing.decomposed import decompose_apart
from sparsify.backends.onnx.tracing.identities import IDENTITIES
from sparsify.backends.onnx.tracing.pads import keep_pads
from sparsify.backends.onnx.tracing.settled import settle
from sparsify.backends.onnx.tracing.trace import quiet_export
from sparsify.errors import BackendError, first_line

aten = torch.ops.aten

# The single-output rules of onnxscript's default set, some of them made exact. Its rules with several outputs try all
# pairs of nodes: cubic.
_RULES = [
    *IDENTITIES,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
]


# Whose results no input decides.
_DRAWING = frozenset(
    {"RandomUniform", "RandomUniformLike", "RandomNormal", "RandomNormalLike", "Bernoulli", "Multinomial"}
)


def to_graph(
    exported: torch.export.ExportedProgram,
    input_names: list[str],
    output_names: list[str],
    *,
    opset: int,
    linear: Linear,
) -> tuple[ir.Model, dict[str, ir.Value]]:
    """Translate and optimise ``exported``.

    Returns:
        The model, and its parameters and saved buffers by their names in ``exported.state_dict``: values without
        numbers, for whoever knows where these lie. They are neither inputs nor initializers of the graph.

    Raises:
        BackendError: an operator has no ONNX translation.
    """
    table: dict[Callable[..., object], Callable[..., object]] = {aten.linear.default: _linear_as_gemm}
    if linear == "matmul":
        table = {aten.linear.default: _linear_as_matmul, aten.addmm.default: _addmm_as_matmul}
    spread_attention(exported)
    spread_masks(exported)
    settle(exported)
    decompose_apart(exported)
    try:
        with quiet_export(), contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(
                exported,
                input_names=input_names,
                output_names=output_names,
                optimize=False,
                opset_version=opset,
                custom_translation_table=table,
            )
    except Exception as error:  # the exporter wraps whatever goes wrong in errors of its own
        raise _untranslated(error, opset) from error
    assert program is not None
    model = program.model
    parameters = _detach(model, set(exported.state_dict))
    try:
        _optimise(model)
    except Exception as error:  # what onnxscript's folding says of a node that it cannot compute
        raise BackendError(
            f"exporting to ONNX at opset {opset}",
            found=f"onnxscript cannot simplify the graph ({first_line(error)})",
            do="See the traceback with --debug; --to hf writes the pruned model without a graph",
        ) from error
    for value in parameters.values():
        model.graph.inputs.remove(value)
    _check_operators(model)
    return model, {name: value for name, value in parameters.items() if value.uses()}


def _linear_as_gemm(x: Any, weight: Any, bias: Any = None) -> Any:
    """``aten.linear`` as one 2-D Gemm on the weight as it is stored, [out_features, in_features]."""
    out_features, in_features = int(weight.shape[0]), int(weight.shape[1])
    flat = op.Reshape(x, op.Constant(value_ints=[-1, in_features]))
    product = op.Gemm(flat, weight, transB=1) if bias is None else op.Gemm(flat, weight, bias, transB=1)
    shape = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[out_features]), axis=0)
    return op.Reshape(product, shape)


def _linear_as_matmul(x: Any, weight: Any, bias: Any = None) -> Any:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _addmm_as_matmul(bias: Any, x: Any, weight: Any, beta: float = 1.0, alpha: float = 1.0) -> Any:
    product = op.MatMul(x, weight)
    if alpha != 1:
        product = op.Mul(product, op.CastLike(op.Constant(value_float=float(alpha)), product))
    if beta != 1:
        bias = op.Mul(bias, op.CastLike(op.Constant(value_float=float(beta)), bias))
    return op.Add(product, bias)


def _detach(model: ir.Model, names: set[str]) -> dict[str, ir.Value]:
    """Make graph inputs of the initializers ``names``, so that no pass reads, merges or renames them."""
    graph, found = model.graph, {}
    # In the graph's order: a set's own would be another one in every process, and so would the file.
    for name in [name for name in graph.initializers if name in names]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        found[name] = value
    return found


def _optimise(model: ir.Model) -> None:
    with quiet_export():
        common.InlinePass()(model)
        for _ in range(2):
            fold_constants_ir(model, onnx_shape_inference=True)
            RewritePass(_RULES)(model)
            common.RemoveUnusedNodesPass()(model)
        onnx_fusions.fuse(model)
        stretch_rotations(model)
        keep_pads(model)
        for tidy in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
            common.ClearMetadataAndDocStringPass(),
        ):
            tidy(model)
    model.producer_name = "sparsify"
    model.producer_version = None


def _check_operators(model: ir.Model) -> None:
    strange = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.all_nodes() if n.domain not in ("", "ai.onnx")})
    if strange:
        raise BackendError(
            "exporting to ONNX",
            found=f"operators outside the ai.onnx domain: {', '.join(strange)}",
            do="No runtime would load them; report the model",
        )
    if drawn := sorted({n.op_type for n in model.graph.all_nodes() if n.op_type in _DRAWING}):
        raise BackendError(
            "exporting to ONNX",
            found=f"the model draws random numbers when it runs ({', '.join(drawn)}): no two runs would be alike",
            do="Give batches with the inputs that it draws else (calibration in Python), or use --to hf",
        )


def name_dimensions(model: ir.Model, dims: Mapping[str, list[str | int]]) -> None:
    """Give inputs and outputs the dimension names of their contract; -1 stands for what is there.

    Outputs that the contract has no names for take those of the inputs that they are as large as.
    """
    known: dict[object, str] = {}
    for value in model.graph.inputs:
        for size, dim in zip(value.shape or (), dims.get(str(value.name), ()), strict=False):
            if isinstance(size, ir.SymbolicDim) and isinstance(dim, str):
                known[size.value] = dim
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        if value.name in dims:
            named = [value.shape[i] if dim == -1 else dim for i, dim in enumerate(dims[value.name])]
        else:
            named = [known.get(size.value, size) if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
        value.shape = ir.Shape(named)


def _untranslated(error: Exception, opset: int) -> BackendError:
    cause: BaseException | None = error
    lines = []
    while cause is not None:
        lines.append(first_line(cause))
        cause = cause.__cause__ or cause.__context__
    # The innermost error names the operator; the outer ones only that there was one.
    found = next((line for line in lines if "No ONNX function" in line or "No decompositions" in line), lines[-1])
    if operator := re.search(r"OpOverload\(op='([^']+)'", found):
        found = f"operator {operator[1]} is one that torch's exporter knows none of ONNX for"
    return BackendError(
        f"exporting to ONNX at opset {opset}",
        found=found,
        do="Use --to hf, or another opset (18 to 24) if it is an old one",
    )
