"""Inputs whose numbers decide the shapes inside a model: how many patches an image has, how large it was.

A graph has one set of shapes, so it is traced with the numbers of such an input in it, and serves only batches that
have the same. ``torch.export`` would take them for unknown and give up where a loop runs over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

# More elements than any description of images has; less than a sequence of tokens.
_MOST = 1 << 14
_NEVER = ("input_ids", "inputs_embeds", "position_ids", "labels")


def could_be_literal(batch: Mapping[str, Tensor]) -> list[str]:
    """Names of the inputs of ``batch`` that may describe shapes: whole numbers, and not one for each token."""
    tokens = {t.shape for n, t in batch.items() if n.endswith("input_ids")}
    return [
        name
        for name, tensor in batch.items()
        if not tensor.is_floating_point()
        and tensor.shape not in tokens
        and tensor.numel() <= _MOST
        and not name.endswith(_NEVER)
    ]


@contextmanager
def literal(module: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """``module`` with ``inputs`` among its arguments, whose numbers are known while it is traced."""
    forward = module.forward

    def with_inputs(*args: Any, **kwargs: Any) -> Any:
        with _Known(inputs.values()):
            return forward(*args, **kwargs, **inputs)

    module.forward = with_inputs
    try:
        yield
    finally:
        del module.forward


class _Known(TorchFunctionMode):
    """Computes at once what is computed from ``tensors`` alone, whose numbers a trace would forget."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        # Tensors by identity, and themselves, so that none takes the identity of one that is gone.
        self.known: dict[int, Tensor] = {id(tensor): tensor for tensor in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not given or not all(id(value) in self.known for value in given):
            return func(*args, **kwargs)
        with _disable_current_modes():
            result = func(*args, **kwargs)
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                self.known[id(value)] = value
        return result
