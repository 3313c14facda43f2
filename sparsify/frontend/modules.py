"""Models as people hold them in memory: what is wrapped around them taken off, and a folder made of them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.errors import CheckpointError, first_line
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.writer import write_all
from sparsify.ir.store import RenamedStore, TensorStore

# What transformers cuts the files of a model at that it saves.
_SHARD = 50 * 10**9
_INSIDE = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of ``torch.compile`` and of those who run it on several devices; of a model of peft a copy
    with its adapters merged.

    Raises:
        CheckpointError: adapters that cannot be merged, or a part of it that is wrapped: its parameters have other
            names then.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif _compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        elif _of_peft(model) and hasattr(model, "merge_and_unload"):
            model = _merged(model)
        else:
            break
    for name, module in model.named_modules():
        asked = f"the model {type(model).__name__}"
        if _of_peft(module):
            raise CheckpointError(
                asked,
                found=f"an adapter of peft in it ({name or 'the model'} is a {type(module).__name__})",
                do="Merge it with peft (merge_and_unload()), or give the model without it",
            )
        if name and (_compiled(module) or type(module).__name__ in ("FullyShardedDataParallel", "CheckpointWrapper")):
            raise CheckpointError(
                asked,
                found=f"{name} in it is wrapped, in a {type(module).__name__}",
                do="Give the model as it is before that, or its folder",
            )
    return model


def _merged(model: Any) -> nn.Module:
    """What ``model`` computes as a model without adapters; ``model`` stays as it is."""
    try:
        merged: nn.Module = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    except Exception as error:  # of many kinds: some adapters cannot be merged, some weights are quantized
        raise CheckpointError(
            f"the model {type(model).__name__}",
            found=f"an adapter of peft that does not merge ({first_line(error)})",
            do="Give the model without it",
        ) from error
    return merged


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def without_wrappers(store: TensorStore) -> TensorStore:
    """``store`` with the names that the model's own parameters have: a state that was saved from within
    ``torch.compile`` or DistributedDataParallel has ``_orig_mod.`` and ``module.`` in them.

    Raises:
        CheckpointError: two tensors would have one name then.
    """
    names = list(store.names())
    own = {name: _INSIDE.sub("", name) for name in names}
    while names and all(name.startswith("module.") for name in own.values()):
        own = {name: _INSIDE.sub("", new.removeprefix("module.")) for name, new in own.items()}
    if all(name == new for name, new in own.items()):
        return store
    turned = {new: name for name, new in own.items()}
    if len(turned) != len(own):
        double = next(name for name, new in own.items() if turned[new] != name)
        raise CheckpointError(
            f"tensor {double}",
            found=f"{turned[own[double]]} is the same without its wrapper",
            do="Take one of them out",
        )
    return RenamedStore(store, turned)


def save_module(model: Any, folder: Path) -> Checkpoint:
    """Write a transformers model in memory into ``folder`` as its ``save_pretrained`` names things: config.json, its
    settings for generation whatever they are, and its tensors, each tied one once.

    Raises:
        CheckpointError: parameters that share memory in a way that no file can say.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.dynamic_module_utils import custom_object_save
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.to_json_file(folder / "config.json", use_diff=True)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        # transformers refuses to save some settings that it reads.
        model.generation_config.to_json_file(
            folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"]
        )
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    try:
        state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    except RuntimeError as error:
        raise CheckpointError(
            f"saving {type(model).__name__}", found=f"tensors that share memory ({error})", do="Clone one of them"
        ) from error
    layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
    return write_all(folder, layout, lambda name: _read(state[name]), _SHARD)


def _read(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
