"""Numbers that follow from constants while a model is traced, and questions that its Python asks of them.

A model's Python asks tensors for numbers: how far to pad, how many windows there are, whether a mask hides anything. A
trace has no numbers, and ``torch.export`` gives up. Where they follow from the shapes alone, from what the model makes
of nothing, or from buffers of its own, they are computed beside the trace and the question is answered; the graph is
what it would have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from sparsify.frontend.tracing.places import model_line

# What a message of ``aten._assert_async`` in a graph begins with, where it says which way a trace went.
WAY = "sparsify traced one way at "

# By their names in torch: functions of which Python wants numbers, not a tensor.
_ASKING = frozenset({"__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy"}) | {
    "__array__", "equal", "allclose", "is_nonzero",
}  # fmt: skip
# Whose results have as many elements as the numbers say; ``where`` and ``__getitem__`` have where the shapes differ.
_COUNTING = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave"}) | {
    "bincount", "where", "__getitem__", "tensor_split",
}  # fmt: skip
# That make a tensor of no other.
_MAKING = frozenset({"zeros", "ones", "full", "arange", "tensor", "as_tensor", "eye", "linspace", "tril_indices"}) | {
    "scalar_tensor", "triu_indices",
}  # fmt: skip
# Whose numbers are not known, whatever they are of.
_CHANCE = frozenset({"empty_like", "new_empty", "empty", "multinomial", "bernoulli", "bernoulli_", "normal_"}) | {
    "uniform_", "random_", "rand_like", "randn_like", "randint_like", "exponential_", "normal", "poisson",
}  # fmt: skip
# Whose arguments, but for the first, are sizes: a tensor of one whole number is as good as the number.
_SIZED = frozenset({"pad", "interpolate", "view", "reshape", "expand", "repeat", "unflatten", "split", "narrow"}) | {
    "zeros", "ones", "full", "empty", "arange", "new_zeros", "new_ones", "new_full", "chunk", "roll", "topk",
    "multinomial",
}  # fmt: skip
# That are filled with one number, whatever tensor they are shaped like.
_FILLED = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}
# Elements of a tensor whose numbers are computed: a mask of 2000 tokens by 2000.
_MOST = 1 << 22
# Of a buffer whose numbers are kept: sizes and positions, not tables.
_BUFFER = 1 << 16


class Known(TorchFunctionMode):
    """Computes at once what is computed from ``tensors`` alone, whose numbers a trace would forget.

    Args:
        numbers: pairs of a tensor of the trace and what it holds; None: what a trace makes stays the trace's, and only
            ``tensors`` are known.
        given: tensors that a user gives anew in each batch, and that mark something. Whether something holds of them
            is asked of a batch before it runs: the trace goes the way on which it does not, or holds of all.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        numbers: Iterable[tuple[Tensor, Tensor]] | None = None,
        given: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        # Tensors by identity, and themselves, so that none takes the identity of one that is gone.
        self.known: dict[int, tuple[Tensor, Tensor]] = {id(tensor): (tensor, tensor) for tensor in tensors}
        # A copy: what a model writes to its buffers while it is traced is not written to them.
        with _disable_current_modes():
            self.known |= {
                id(traced): (traced, real.clone()) for traced, real in numbers or () if real.numel() <= _BUFFER
            }
        self.given: dict[int, Tensor] = {id(tensor): tensor for tensor in given}
        self.wide = numbers is not None
        # Of those, what is true if something holds of all elements: usually it does, as a mask of ones shows.
        self.of_all: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        held = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = bool(held) and all(id(value) in self.known for value in held)
        if known and all(self.known[id(value)][1] is value for value in held):
            return self._at_once(func, args, kwargs)
        if not self.wide:
            return func(*args, **kwargs)
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        if known and name in _ASKING:
            with _disable_current_modes():
                return func(*self._real(args), **self._real(kwargs))
        args, kwargs = self._with_sizes(name, args, kwargs)
        if known and name in _COUNTING and (made := self._counted(func, args, kwargs)) is not None:
            return made
        ofgiven = bool(held) and all(id(value) in self.known or id(value) in self.given for value in held)
        if ofgiven and (name == "__bool__" or (name == "item" and args[0].dtype is torch.bool)):
            return self._one_way(args[0])
        written = self._written(name, args, kwargs)
        result = func(*args, **kwargs)
        results = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        if written is not None and (not known or name in _CHANCE):
            self._forget(written, ofgiven and name not in _CHANCE)
        elif written is not None:
            with _disable_current_modes():
                func(*self._real(args), **self._real(kwargs))
        elif known or (not held and name in _MAKING):
            self._pair(name, func, args, kwargs, results)
        elif name in _FILLED and results:
            (like,) = results
            if like.numel() <= _MOST and not like.is_meta:
                with _disable_current_modes():
                    self.known[id(like)] = (
                        like,
                        torch.full(like.shape, _FILLED[name], dtype=like.dtype, device=like.device),
                    )
        elif ofgiven:
            self.given |= {id(value): value for value in results}
            if name == "all" or (name == "bool" and id(args[0]) in self.of_all):
                self.of_all |= {id(value): value for value in results}
        return result

    def _at_once(self, func: Any, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            result = func(*args, **kwargs)
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                self.known[id(value)] = (value, value)
        return result

    def _real(self, value: Any) -> Any:
        """``value`` with the numbers of its tensors in their places."""
        return pytree.tree_map(lambda leaf: self.known[id(leaf)][1] if isinstance(leaf, Tensor) else leaf, value)

    def _counted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What ``func`` gives, as constants of the trace; None where its shape does not depend on numbers."""
        index = args[1] if len(args) > 1 else None
        if func.__name__ == "__getitem__":
            if not any(
                isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in pytree.tree_leaves(index)
            ):
                return None
        elif func.__name__ == "where" and len(args) + len(kwargs) > 1:
            return None
        with _disable_current_modes():
            found = func(*self._real(args), **self._real(kwargs))
        return pytree.tree_map(self._constant, found)

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A copy: what is written to it must not be written to the constant.
        traced = torch.clone(value)
        self.known[id(traced)] = (traced, value)
        return traced

    def _pair(self, name: str, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Compute the numbers of ``results``, where that is cheap and possible."""
        if name in _CHANCE or not results or any(value.numel() > _MOST or value.is_meta for value in results):
            for value in results:
                self.known.pop(id(value), None)
            return
        with _disable_current_modes():
            found = func(*self._real(args), **self._real(kwargs))
        real = [value for value in pytree.tree_leaves(found) if isinstance(value, Tensor)]
        for value, numbers in zip(results, real, strict=True):
            self.known[id(value)] = (value, numbers)

    def _with_sizes(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with whole numbers in the place of known tensors where a function takes sizes or a slice's ends."""
        if name in ("__getitem__", "__setitem__"):
            return (args[0], pytree.tree_map(self._ends, args[1]), *args[2:]), kwargs
        if name not in _SIZED:
            return args, kwargs
        first = 0 if name in _MAKING or name == "empty" else 1
        return (*args[:first], *(pytree.tree_map(self._size, a) for a in args[first:])), {
            key: pytree.tree_map(self._size, value) for key, value in kwargs.items()
        }

    def _size(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() or value.is_floating_point() or id(value) not in self.known:
            return value
        with _disable_current_modes():
            return int(self.known[id(value)][1])

    def _ends(self, value: Any) -> Any:
        if not isinstance(value, slice):
            return value
        return slice(*(self._size(end) for end in (value.start, value.stop, value.step)))

    def _written(self, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """The tensor to which a function writes."""
        if isinstance(kwargs.get("out"), Tensor):
            written: Tensor = kwargs["out"]
            return written
        inplace = name.startswith("__i") and name not in ("__iter__", "__invert__", "__index__", "__int__")
        if args and (inplace or name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))):
            return args[0] if isinstance(args[0], Tensor) else None
        return None

    def _forget(self, written: Tensor, ofgiven: bool) -> None:
        """Nothing is known any more of what shares its memory with ``written``; ``ofgiven``: but what a batch says."""
        own = written.untyped_storage()._cdata

        def lost(traced: Tensor) -> bool:
            return traced is written or traced.untyped_storage()._cdata == own

        forgotten = {key: pair[0] for key, pair in self.known.items() if lost(pair[0])}
        self.known = {key: pair for key, pair in self.known.items() if key not in forgotten}
        if ofgiven:
            self.given |= forgotten
        else:
            self.given = {key: traced for key, traced in self.given.items() if not lost(traced)}

    def _one_way(self, asked: Tensor) -> bool:
        """Go on where ``asked`` does not hold, or where it does of all, and leave in the graph what says so."""
        holds = id(asked) in self.of_all
        as_traced = asked != 0 if holds else asked == 0
        torch.ops.aten._assert_async.msg(as_traced.reshape(()), WAY + model_line())
        return holds


def real_buffers(named: Iterable[tuple[str, Tensor]]) -> Mapping[str, Tensor]:
    """The buffers whose numbers are known before a trace: those that a model makes for itself."""
    return {name: value.detach() for name, value in named if not isinstance(value, FakeTensor) and not value.is_meta}
