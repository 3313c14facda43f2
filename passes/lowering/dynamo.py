"""``torch.compile(model, backend="sparsify")``: pruned weights packed, in front of Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparsify.errors import BackendError
from sparsify.passes.lowering.lower_sparse import LowerSparse
from sparsify.passes.lowering.record import Lowered


def dynamo_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Pruned weights packed, the rest compiled by Inductor.

    The packed copies are taken when the model is compiled: change its weights, and it has to be compiled again.

    Raises:
        BackendError: compiled where gradients are wanted.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    lowered = LowerSparse()(graph_module, example_inputs).graph_module
    records: list[Lowered] = lowered.meta["sparsify"]
    packed = [r for r in records if r.layout != "dense"]
    if packed and torch.is_grad_enabled() and any(getattr(v, "requires_grad", False) for v in example_inputs):
        raise BackendError(
            "torch.compile(backend='sparsify')",
            found="gradients are on, and packed weights have none",
            do="Run the model under torch.no_grad() or torch.inference_mode()",
        )
    if records and not packed:
        reasons = sorted({r.reason for r in records if r.reason is not None})
        warnings.warn(
            f"torch.compile(backend='sparsify'): none of {len(records)} weights was packed ({'; '.join(reasons[:3])})",
            RuntimeWarning,
            stacklevel=2,
        )
    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **(options or {})}
    return compile_fx(lowered, list(example_inputs), config_patches=patches or None)
