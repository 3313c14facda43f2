"""Modules with their weights in memory, of an opened model or of a folder."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsify.errors import SpecError
from sparsify.frontend.building.computed import initialise
from sparsify.frontend.skeleton import DTYPES
from sparsify.frontend.source import Source, open_source
from sparsify.ir.weights import Weights


def materialize(source: Source, weights: Weights, changed: set[str]) -> nn.Module:
    """A module with the parameters of ``weights``; of a module in memory only ``changed`` ones are new.

    Parameters in floating point are to be trained, as they are when transformers loads them; those of a module in
    memory as it says.
    """
    if source.folder is not None:
        model = source.skeleton()
        if lacking := [n for n, t in model.state_dict().items() if n not in weights and isinstance(t, FakeTensor)]:
            initialise(model, lacking)
        changed = {weights.canonical(n) for n, _ in model.named_parameters()} | {
            weights.canonical(n) for n, _ in model.named_buffers() if weights.canonical(n) in weights
        }
    else:
        kept = {id(t): t for t in (*source.module.parameters(), *source.module.buffers())}
        model = copy.deepcopy(source.module, memo=dict(kept))
    fresh: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            full = weights.canonical(f"{prefix}.{name}" if prefix else name)
            if old is None or full not in changed or full not in weights:
                continue
            if full not in fresh:
                value = weights.read(full).to(device="cpu" if source.folder else old.device, dtype=old.dtype)
                fresh[full] = nn.Parameter(value, requires_grad=value.is_floating_point() and old.requires_grad)
            if name in module._parameters:
                module._parameters[name] = fresh[full]
            else:
                module._buffers[name] = fresh[full].data
    if source.folder is not None:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return model


def load(
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    check: bool = True,
    allow_nan: bool = False,
) -> nn.Module:
    """The model of any folder that sparsify reads, in memory and in eval mode: ordinary, packed, of ragged widths, or
    quantized (a GGUF file too), which is made dense.

    Args:
        dtype: of its parameters; None: as they are stored, of a quantized model bfloat16.
        check: hold every byte against the folder's ``sparsify.json``. allow_nan: let NaN and infinity pass.

    Raises:
        CheckpointError: no such folder, a broken one, or one whose bytes are not those that were written.
        SpecError: a dtype that is none.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        found = f"{type(dtype).__name__}, no dtype of torch"
        raise SpecError(f"dtype {dtype!r}", found=found, do="Give torch.float16, say")
    source = open_source(folder, trust_remote_code=trust_remote_code, check=check, allow_nan=allow_nan)
    if source.quantization is not None and dtype is not None and dtype in DTYPES.values():
        # Dequantized into it, not rounded on the way.
        source = open_source(folder, trust_remote_code=trust_remote_code, check=check, allow_nan=allow_nan, dtype=dtype)
    model = materialize(source, source.weights, set(source.weights.parameters()))
    return model.eval() if dtype is None else model.to(dtype).eval()
