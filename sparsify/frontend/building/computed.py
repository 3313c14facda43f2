"""What no checkpoint holds and transformers computes when it loads one: buffers, and parameters that are a formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.frontend.building.bounds import small_buffers
from sparsify.frontend.complete import may_be_missing
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.ir.store import TensorStore


def left_out(model: Any, store: TensorStore) -> list[str]:
    """Names of the parameters and saved buffers of a model on the meta device that ``store`` lacks, as it may.

    Raises:
        CheckpointError: it lacks others, or does not fit the model.
    """
    held, optional = set(store.names()), may_be_missing(model)
    if not any(optional(name) and name not in held for name in model.state_dict()):
        return []
    weights = weights_of_checkpoint(model, store)
    return [name for name in model.state_dict() if name not in weights]


def compute(model: Any, missing: list[str], folder: Path) -> None:
    """Give the model, which is on the meta device, all that it can compute, as transformers does when it loads one: by
    the initialisation of the whole model, where each part of a composite model initialises its own and a parent may
    fill what a child holds.

    Of ``missing`` only that is computed which comes out the same twice: what is random stays on the meta device.

    Raises:
        CheckpointError: it would fill the memory.
    """
    small_buffers(model, folder, missing)
    for name, buffer in list(model.named_non_persistent_buffers(remove_duplicate=False)):
        _put(model, name, torch.full_like(buffer, 0, device="cpu"))
    if not missing:
        _initialise(model)
        return
    first = _initialised(model, missing, 0)
    second = _initialised(model, missing, 1)
    for name in missing:
        same = torch.equal(first[name], second[name])
        _put(model, name, second[name] if same else torch.empty_like(second[name], device="meta"))


def initialise(model: Any, names: list[str]) -> None:
    """Give a skeleton's parameters and saved buffers ``names``, which its checkpoint lacks, what transformers begins
    with, which may be random: a loaded model has numbers everywhere.

    All others are initialised too, so those of the checkpoint are put in afterwards.
    """
    _initialised(model, names, 0)


def _initialised(model: Any, names: list[str], seed: int) -> dict[str, Tensor]:
    """The tensors under ``names`` after an initialisation that found nothing but ``seed`` in them."""
    for name in names:
        old = model.get_parameter_or_buffer(name)
        _put(model, name, torch.full(old.shape, seed, dtype=old.dtype, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _initialise(model)
    return {name: model.get_parameter_or_buffer(name).detach().clone() for name in names}


def _initialise(model: Any) -> None:
    """All of it, parameters on the meta device too, where that costs nothing."""
    for module in model.modules():
        # A constructor may have done it already, when nothing was there yet.
        module._is_hf_initialized = False
    model.initialize_weights()


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
