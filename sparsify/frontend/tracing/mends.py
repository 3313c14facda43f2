"""What keeps whole architectures from being traced in transformers and torch, put right for the time of a trace.

Each says what fails, in which version it was seen, and does nothing where it is mended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from sparsify.frontend.tracing.both_ways import leave_masks_out
from sparsify.frontend.tracing.literal import running_as


@contextmanager
def mended(module: nn.Module, given: Collection[str] = ()) -> Iterator[None]:
    """While it is open, ``module`` can be traced with inputs ``given`` where only the faults below stand against it.

    Raises:
        TraceError: see :func:`sparsify.frontend.tracing.both_ways.leave_masks_out`.
    """
    with ExitStack() as stack:
        if hasattr(module, "config"):
            _masks(stack)
            leave_masks_out(stack, module, given)
        if type(module).__name__.startswith(("Autoformer", "Informer")):
            _series(stack)
        if type(module).__name__ == "Llama4ForConditionalGeneration":
            _llama4(stack)
        _casts(stack)
        _checks(stack)
        yield


@contextmanager
def as_eager(module: nn.Module) -> Iterator[None]:
    """``module`` as it runs without any compiler, as far as its code asks, and giving tensors alone.

    transformers 5.24: T5-like models make no mask of ones where they are compiled, and fail for want of it; others have
    checks of values there, which no trace can make. Not for a first try: the graphs of models that need it alone.
    """
    files = {sys.modules.get(name) for name in {type(part).__module__ for part in module.modules()}}
    with ExitStack() as stack:
        for file in files:
            if hasattr(file, "is_torchdynamo_compiling"):
                stack.enter_context(patch.object(file, "is_torchdynamo_compiling", lambda: False))
        stack.enter_context(running_as(module, _without_caches))
        yield


def _without_caches(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model may give a cache of past tokens whatever it is told; an exported graph can give tensors alone."""
    out = forward(*args, **kwargs)
    if isinstance(out, dict):
        for name in [name for name, value in out.items() if _is_cache(value)]:
            # An output of transformers refuses to lose one by its own ways.
            out = type(out)(**{n: None if n == name else v for n, v in out.items()})
    return out


def _is_cache(value: object) -> bool:
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


def _casts(stack: ExitStack) -> None:
    """transformers 5.24: NLLB-MoE casts a layer whenever it runs. A cast to what a layer is already does nothing, and
    torch, while it traces, cannot put the same parameter into its place."""
    to = nn.Module.to

    def cast(layer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*layer.parameters(), *layer.buffers()]
        same = form is None and all(
            (device is None or tensor.device == device)
            and (dtype is None or tensor.dtype == dtype or not (tensor.is_floating_point() or tensor.is_complex()))
            for tensor in tensors
        )
        return layer if same else to(layer, *args, **kwargs)

    stack.enter_context(patch.object(nn.Module, "to", cast))


def _checks(stack: ExitStack) -> None:
    """torch 2.13: a distribution looks at the numbers that it is made of, to raise an error where they are none."""
    stack.enter_context(patch.object(torch.distributions.Distribution, "_validate_args", False))


def _masks(stack: ExitStack) -> None:
    """transformers 5.24, torch 2.13: a mask with a function of its own (Gemma 3 with images, packed sequences) is made
    by ``torch.vmap``, and what it reads of a tensor by an autograd function, for the gradient's sake; an exported graph
    can run neither. The function is one of elements, so that axes of size one do the same."""
    from torch._dynamo import _trace_wrapped_higher_order_op as wrapped
    from transformers import masking_utils

    def index(tensor: Tensor, indices: Any) -> Tensor:
        found: Tensor = torch.ops.aten.index(tensor, indices)
        return found

    def expansion(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mask(*ranges: Tensor) -> Tensor:
            four = [r.reshape([-1 if axis == own else 1 for axis in range(4)]) for own, r in enumerate(ranges)]
            return function(*four).expand([len(r) for r in ranges])

        return mask

    if hasattr(wrapped, "mod_index"):
        stack.enter_context(patch.object(wrapped, "mod_index", index))
    if hasattr(masking_utils, "_vmap_expansion_sdpa"):
        stack.enter_context(patch.object(masking_utils, "_vmap_expansion_sdpa", expansion))


def _series(stack: ExitStack) -> None:
    """transformers 5.24: attention that shortens a series, or correlates it, takes no mask of the length that it had. A
    run leaves out a mask that hides nothing; a trace would make it."""
    from transformers import masking_utils

    def left_out(padding_mask: Tensor | None, *_: Any) -> bool:
        return padding_mask is None

    if hasattr(masking_utils, "_ignore_bidirectional_mask_sdpa"):
        stack.enter_context(patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", left_out))


def _llama4(stack: ExitStack) -> None:
    """transformers 5.24: the model's forward copies ``image_outputs`` from the output of its language model, which has
    no such field, so that it fails whatever it is given. Nothing is what a text without images has there."""
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        stack.enter_context(patch.object(MoeCausalLMOutputWithPast, "image_outputs", None, create=True))
