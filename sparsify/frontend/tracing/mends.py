"""What keeps whole architectures from being traced in transformers and torch, put right for the time of a trace.

Each says what fails, in which version it was seen, and does nothing where it is mended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from sparsify.frontend.tracing.both_ways import leave_masks_out


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
        yield


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
