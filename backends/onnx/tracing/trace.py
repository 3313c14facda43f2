"""From a model to an ExportedProgram with dynamic shapes, without a byte of its weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sparsify.backends.onnx.options import Cache
from sparsify.backends.onnx.tracing.choice import contract_for
from sparsify.backends.onnx.tracing.contract import Contract
from sparsify.errors import BackendError
from sparsify.frontend.text_config import text_config
from sparsify.frontend.tracing.places import reason_of
from sparsify.host import quiet

T = TypeVar("T")
# More tokens than any example has: a graph for fewer alone is one of its example.
_SHORT = 16


def trace_model(
    module: nn.Module,
    batch: Mapping[str, Tensor],
    compute: torch.dtype | None = None,
    names: Collection[str] = (),
    cache: Cache = "keep",
    fixed: Mapping[str, Tensor] | None = None,
) -> tuple[torch.export.ExportedProgram, Contract]:
    """Export ``module`` under the contract that fits it; the module stays as it is.

    Args:
        batch: example inputs of models that do not generate.
        compute: dtype of the arithmetic; the module's own where None.
        names: inputs that the model's tokenizer gives.
        cache: whether a model that generates keeps past tokens' states.
        fixed: inputs of one that does not whose numbers decide its sizes.

    Raises:
        BackendError: the model cannot be traced with a dynamic batch and sequence.
    """
    mode = symbolic_mode()
    model = fake_copy(module, mode, compute)
    _choose_implementations(model)

    def run(function: Callable[[], T]) -> T:
        with torch.no_grad(), mode:
            return function()

    with quiet_export():
        contract = contract_for(model, run, batch, names, cache, fixed)
        if compute is not None:
            _match_inputs(contract, compute)
        return export_contract(contract), contract


def export_contract(contract: Contract) -> torch.export.ExportedProgram:
    """``torch.export`` of the contract's wrapper; every dimension that it names is dynamic."""
    state_names = iter(contract.state_names("past"))
    shapes = {name: _dynamic(contract.dims.get(name, [])) for name in contract.inputs}
    states = [tuple(_dynamic(contract.dims[next(state_names)]) for _ in pair) for pair in contract.states]
    try:
        with torch.no_grad():
            exported = torch.export.export(
                contract.wrapper.eval(),
                (contract.inputs, contract.states),
                dynamic_shapes=(shapes, states),
                strict=False,
            )
    except Exception as error:  # export raises many kinds; all mean that there is no graph
        raise BackendError(
            f"exporting {type(contract.wrapper.model).__name__} to ONNX",
            found=f"torch.export cannot trace it with dynamic shapes: {_why(error)}",
            do="See the traceback with --debug; --to hf writes the pruned model without a graph",
        ) from error

    _check_lengths(exported, contract)
    return exported


def _check_lengths(exported: torch.export.ExportedProgram, contract: Contract) -> None:
    """Refuse a graph that holds for about the lengths of its example alone: a size of the trace became a number in it
    (the compressed keys of DeepSeek V4).

    Raises:
        BackendError: so it is.
    """
    model: Any = contract.wrapper.model
    context = getattr(text_config(getattr(model, "config", None)), "max_position_embeddings", None)
    most = min((int(r.upper) for r in exported.range_constraints.values() if r.upper < _SHORT), default=_SHORT)
    if most < _SHORT and not (isinstance(context, int) and context <= _SHORT):
        raise BackendError(
            f"exporting {type(model).__name__} to ONNX",
            found=f"its graph would hold for {most} tokens at most: a size within it becomes a number in the trace",
            do="Use --to hf",
        )


def _why(error: Exception) -> str:
    said = re.findall(r"L\['inputs'\]\['(\w+)'\]\.size\(\)\[(\d+)\]", str(error))
    if not said or "onstraints violated" not in str(error):
        return reason_of(error)
    axes = ", ".join(f"axis {axis} of {name}" for name, axis in dict.fromkeys(said))
    return f"its code takes {axes} for a fixed number (a loop over it, or a comparison with another size)"


def _dynamic(dims: list[str | int]) -> dict[int, object]:
    return {axis: Dim.DYNAMIC for axis, dim in enumerate(dims) if isinstance(dim, str)}


def symbolic_mode() -> FakeTensorMode:
    """A mode for tensors without numbers, some of whose sizes are symbols."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def fake_copy(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``module`` whose parameters and saved buffers have shapes and no numbers; tied ones stay one.

    What is in no checkpoint (rotary frequencies; positions that are a formula) keeps its values: the graph holds them
    as constants. Of a skeleton that is all that has numbers.
    """
    state = module.state_dict(keep_vars=True)
    saved = {name for name, tensor in state.items() if isinstance(tensor, FakeTensor)} or set(state)
    memo: dict[int, Tensor] = {}
    with mode:
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            if name not in saved or id(tensor) in memo:
                continue
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=kind)
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    copied = copy.deepcopy(module, memo)
    for name in state.keys() - saved:
        owner, leaf = copied.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        value = getattr(owner, leaf).detach()
        delattr(owner, leaf)
        owner.register_buffer(leaf, value, persistent=False)
    return copied.eval() if not isinstance(module, torch.fx.GraphModule) else copied


def _choose_implementations(model: Any) -> None:
    """Attention that ONNX has an operator for, and experts without loops over data."""
    if hasattr(model, "set_attn_implementation") and getattr(model, "_supports_sdpa", False):
        # Of several models in one (MusicGen) one may not: then each stays as it is.
        with suppress(ValueError):
            model.set_attn_implementation("sdpa")
    # A model of several (Nemotron-H Omni) may not say it of its part that has experts.
    for part in model.modules():
        if getattr(part, "_can_set_experts_implementation", bool)():
            part.set_experts_implementation("batched_mm")


def _match_inputs(contract: Contract, compute: torch.dtype) -> None:
    for name, value in contract.inputs.items():
        if value.is_floating_point():
            contract.inputs[name] = value.to(compute)


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence what torch, transformers and onnxscript say while exporting; errors still surface as exceptions."""
    with quiet("torch.onnx", "onnxscript", "onnx_ir", "torch._inductor"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
