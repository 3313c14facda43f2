"""What a config.json may ask for, held against the tensors beside it before anything is built.

A model of a hundred thousand layers takes minutes to build although none of them has a weight.
"""

from __future__ import annotations

import re
import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from sparsify.errors import CheckpointError

# Layers that a config may name however few tensors there are: a model may use one layer's weights many times.
MAX_LAYERS_UNSEEN = 256
# Modules and parameters that a model may have: so many for each tensor, and so many more. Experts that lie stacked in
# one tensor may be modules of their own.
MAX_PARTS_PER_TENSOR, MAX_PARTS_BESIDE = 64, 4096
# Bytes of tensors that no checkpoint holds and that are computed: masks, positions, frequencies.
MAX_BUFFERS = 2 << 30
# Rotary frequencies, of which a head has one for two of its elements.
MAX_FREQUENCIES = 1 << 16
# Pixels of a side of what a vision model reads.
MAX_IMAGE = 4096
# transformers makes a table of all labels; some models compute a table of all positions.
MAX_LABELS, MAX_POSITIONS = 1 << 20, 1 << 24

_LAYERS = re.compile(r"(num|n)_(.*_)?(layers?|blocks)|(encoder|decoder)_layers|layers|depths?")
# How attention is computed; transformers takes "owner/name" for a kernel of the hub.
_ATTENTION = frozenset(
    {"attn_implementation", "_attn_implementation", "attn_implementation_internal", "experts_implementation"}
)
_POSITIONS = re.compile(r"max_position_embeddings|(n|max)_positions|max_seq(uence)?_len(gth)?|seq_length|n_ctx")


def check_config(config: Mapping[str, Any], tensors: int | None, folder: Path) -> None:
    """Hold the content of ``folder``'s config.json against the number of its ``tensors`` (None: not known).

    Raises:
        CheckpointError: more layers than tensors, numbers out of all bounds, NaN, code to be fetched, a dtype that is
            none, or a ``quantization_config`` that is no table.
    """
    for key, value in _leaves(config):
        if isinstance(value, float) and value != value:
            raise _too_much(folder, f"{key} NaN")
        if key in _ATTENTION and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"config.json of {folder}",
                found=f"{key} {value!r}, which names code to fetch from the hub",
                do="Take the line out; nothing of a folder chooses code that runs",
            )
    _check_words(config, folder)
    layers = MAX_LAYERS_UNSEEN if tensors is None else max(MAX_LAYERS_UNSEEN, tensors)
    for key, number in _numbers(config):
        if _LAYERS.fullmatch(key) and number > layers:
            held = "" if tensors is None else f" for the {tensors} tensors in the folder"
            raise _too_much(folder, f"{key} {number}{held}")
        if key == "num_labels" and number > MAX_LABELS:
            raise _too_much(folder, f"{key} {number}, more than {MAX_LABELS}")
        if key == "image_size" and number > MAX_IMAGE:
            raise _too_much(folder, f"{key} {number}, more than {MAX_IMAGE}")
        if _POSITIONS.fullmatch(key) and number > MAX_POSITIONS:
            raise _too_much(folder, f"{key} {number}, more than {MAX_POSITIONS}")


def _check_words(config: Mapping[str, Any], folder: Path) -> None:
    """What transformers takes as it is said, of the model and of its parts, and then fails of with words of its own."""
    parts = (value for value in config.values() if isinstance(value, Mapping) and "model_type" in value)
    for part in (config, *parts):
        for key in ("dtype", "torch_dtype"):
            word = part.get(key)
            dtype = getattr(torch, word, None) if isinstance(word, str) else None
            if word is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                do = "Name the dtype of its weights, as bfloat16"
                raise CheckpointError(
                    f"config.json of {folder}",
                    found=f"{key} {word!r}, which is no floating-point dtype of torch",
                    do=do,
                )
        quantization = part.get("quantization_config")
        if quantization is not None and not isinstance(quantization, Mapping):
            found = f"quantization_config {reprlib.repr(quantization)}, which is no table"
            do = "Take it out where no weight is quantized; else compare config.json with the published one"
            raise CheckpointError(f"config.json of {folder}", found=found, do=do)


@contextmanager
def few_parts(tensors: int | None, folder: Path) -> Iterator[None]:
    """Stop building a model that gets many times more modules and parameters than there are ``tensors``.

    Raises:
        CheckpointError: it does.
    """
    if tensors is None:
        yield
        return
    most, count, here = MAX_PARTS_PER_TENSOR * tensors + MAX_PARTS_BESIDE, 0, threading.get_ident()

    def one_more(*_: Any) -> None:
        nonlocal count
        # The hooks are the whole process's: what other threads build is not counted.
        count += threading.get_ident() == here
        if count > most:
            raise _too_much(folder, f"a model of more than {most} parts for the {tensors} tensors in the folder")

    hooks = [register(one_more) for register in (
        register_module_parameter_registration_hook, register_module_module_registration_hook
    )]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def small_buffers(model: nn.Module, folder: Path, others: Iterable[str] = ()) -> None:
    """Raises:
    CheckpointError: what is computed and not read, still on the meta device, would fill the memory: buffers that no
        checkpoint holds, and the ``others``.
    """
    sizes = {n: b.numel() * b.element_size() for n, b in model.named_non_persistent_buffers()}  # type: ignore[operator]
    state = model.state_dict()
    sizes |= {name: state[name].numel() * state[name].element_size() for name in others}
    for name, buffer in model.named_non_persistent_buffers():  # type: ignore[operator]
        if name.endswith("inv_freq") and buffer.numel() > MAX_FREQUENCIES:
            raise _too_much(folder, f"{buffer.numel()} frequencies in {name}, more than {MAX_FREQUENCIES}")
    if sizes and sum(sizes.values()) > MAX_BUFFERS:
        largest = max(sizes, key=lambda name: sizes[name])
        total = sum(sizes.values())
        raise _too_much(folder, f"{total} bytes of tensors to compute ({largest}, …), more than {MAX_BUFFERS}")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number in a config with the key it stands under."""
    return ((key, value) for key, value in _leaves(config) if isinstance(value, int))


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value in a config with the key it stands under; those of a list under the list's."""
    todo: list[tuple[str, Any]] = list(config.items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += value.items()
        elif isinstance(value, list):
            todo += [(key, each) for each in value]
        else:
            yield key, value


def _too_much(folder: Path, found: str) -> CheckpointError:
    do = "Compare config.json with the one that the model was published with"
    return CheckpointError(f"config.json of {folder}", found=found, do=do)
