"""Functions that loop over a sequence, kept whole: one node of the graph for a call, however long the sequence.

transformers computes gated delta rules chunk by chunk, Mamba's scan and RWKV's attention token by token, in Python: a
trace of such a layer has as many nodes as there are steps, for each layer, and takes minutes or hours. Nothing is
pruned inside: what they are given is computed by linear layers, and what they give goes into one. So a graph calls the
model's own function, with the very arguments that the model gives it: eagerly, with whatever kernel the model would
use, derivatives included.

For the time of a trace the function is an operator of torch's, which only says the shapes of what it gives: these are
found by running the function once, on the meta device, for each set of shapes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from sparsify.host import alone

# By name, in the module of Python in which a model's layers are written (transformers 5.24): functions that take
# tensors and numbers, give a tensor, or several and None, and write to nothing that they are given.
FUNCTIONS = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
    "mamba_selective_scan",
    "rwkv_linear_attention",
)
_LIBRARY, _OPERATOR = "sparsify_recurrences", "call"
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


@dataclass(frozen=True)
class Call:
    """A call that was met: ``arguments`` are its leaves, None for a tensor where ``is_tensor``; ``found`` is what the
    function gives, with meta tensors."""

    function: Callable[..., Any]
    structure: pytree.TreeSpec
    arguments: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    found: Any

    @property
    def tensors(self) -> list[Tensor]:
        return [self.found] if isinstance(self.found, Tensor) else [v for v in self.found if v is not None]

    def filled(self, values: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with ``values`` in the places of the tensors."""
        given = iter(values)
        pairs = zip(self.arguments, self.is_tensor, strict=True)
        leaves = [next(given) if is_tensor else value for value, is_tensor in pairs]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs


@dataclass
class Recurrences:
    """The calls of a trace, in order; ``known`` holds what a function gives for the shapes and arguments met before."""

    calls: list[Call] = field(default_factory=list)
    known: dict[Any, Any] = field(default_factory=dict)

    def stand_in(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What is called in the place of ``function`` while tracing."""

        @functools.wraps(function)
        def met(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
            rest = tuple(None if held else leaf for leaf, held in zip(leaves, is_tensor, strict=True))
            values = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if not values or not all(isinstance(leaf, _PLAIN) for leaf in rest):
                return function(*args, **kwargs)
            call = self._call(Call(function, structure, rest, is_tensor, None), values)
            if call is None:
                return function(*args, **kwargs)
            self.calls.append(call)
            given = iter(getattr(getattr(torch.ops, _LIBRARY), _OPERATOR)(values, len(self.calls) - 1))
            if isinstance(call.found, Tensor):
                return next(given)
            return type(call.found)(None if value is None else next(given) for value in call.found)

        return met

    def _call(self, call: Call, values: list[Tensor]) -> Call | None:
        """``call`` with what it gives; None where that is not tensors and None alone."""
        shapes = tuple((value.shape, value.stride(), value.dtype) for value in values)
        key = (call.function, call.structure, call.arguments, shapes)
        if key not in self.known:
            # torch's modes would write down every operator, and fake tensors are a hundred times slower than meta ones.
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
                args, kwargs = call.filled(torch.empty_strided(*s[:2], dtype=s[2], device="meta") for s in shapes)
                self.known[key] = call.function(*args, **kwargs)
        found = self.known[key]
        parts = found if isinstance(found, (tuple, list)) else [found]
        understood = type(parts) in (tuple, list) and any(isinstance(part, Tensor) for part in parts)
        if not understood or not all(part is None or isinstance(part, Tensor) for part in parts):
            return None
        return Call(call.function, call.structure, call.arguments, call.is_tensor, found)

    def described(self, values: list[Tensor], number: int) -> list[Tensor]:
        """What call ``number`` gives, for torch to trace on with."""
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=values[0].device)
            for t in self.calls[number].tensors
        ]

    def write_into(self, graph: fx.Graph) -> None:
        """Make every node that stands for a call call the function itself."""
        for node in list(graph.nodes):
            if node.op != "call_function" or not str(node.target).startswith(f"{_LIBRARY}.{_OPERATOR}"):
                continue
            values, number = node.args
            call = self.calls[number]
            node.target = call.function
            node.args, node.kwargs = call.filled(values)
            node.meta["val"] = call.found
            places = [0] if isinstance(call.found, Tensor) else [i for i, v in enumerate(call.found) if v is not None]
            for part in list(node.users):
                if isinstance(call.found, Tensor):
                    part.replace_all_uses_with(node)
                    graph.erase_node(part)
                else:
                    part.args = (node, places[part.args[1]])


@contextmanager
def kept_whole(module: nn.Module) -> Iterator[Recurrences]:
    """While it is open, a trace of ``module`` has one node for each call of one of :data:`FUNCTIONS`.

    Patches modules of Python, like what it traces with: one thread at a time. A call with arguments that a node cannot
    have, or that gives more than tensors and None, is traced step by step as torch would.
    """
    met = Recurrences()
    # A class may be of a file that is loaded under no name.
    files = {name: sys.modules.get(name) for name in dict.fromkeys(type(part).__module__ for part in module.modules())}
    held = [(file, name) for file in files.values() for name in FUNCTIONS if callable(getattr(file, name, None))]
    if not held:
        yield met
        return
    with alone(), ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library(_LIBRARY, "FRAGMENT"))
        library.define(f"{_OPERATOR}(Tensor[] values, int number) -> Tensor[]")
        torch.library.register_fake(f"{_LIBRARY}::{_OPERATOR}", met.described, lib=library)
        for file, name in held:
            stack.enter_context(patch.object(file, name, met.stand_in(getattr(file, name))))
        yield met
