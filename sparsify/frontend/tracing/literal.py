"""Inputs whose numbers decide the shapes inside a model: how many patches an image has, how large it was.

A graph has one set of shapes, so it is traced with the numbers of such an input in it, and serves only batches that
have the same. ``torch.export`` would take them for unknown and give up where a loop runs over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.frontend.tracing.known import Known

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
        and not tensor.is_meta
        and not name.endswith(_NEVER)
    ]


@contextmanager
def literal(
    module: nn.Module, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """``module`` with ``inputs`` among its arguments, whose numbers are known while it is traced.

    Args:
        buffers: what its buffers hold, by their names, where what follows from them and from shapes is to be known.
    """

    def with_inputs(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        pairs, given = None, []
        if buffers is not None:
            named = dict(module.named_buffers(remove_duplicate=False))
            pairs = [(named[name], real) for name, real in buffers.items() if name in named]
            leaves = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            # Tokens and masks mark things; a model whose way depends on measured values has no one way.
            given = [value for value in leaves if not value.is_floating_point()]
        with Known(inputs.values(), pairs, given):
            return forward(*args, **kwargs, **inputs)

    with running_as(module, with_inputs):
        yield


@contextmanager
def running_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """``module`` with a forward that calls ``function`` with its own forward and the arguments."""
    before, forward = module.__dict__.get("forward"), module.forward
    module.forward = lambda *args, **kwargs: function(forward, *args, **kwargs)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
