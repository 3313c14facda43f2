"""A GPU that is not there: tensors that are said to lie on it, computed on this CPU, and nothing that mixes the two.

Under :class:`FakeGPU` everything that names the device ``cuda`` works: a tensor brought there is a :class:`Tagged` one,
what is computed from it is too, and an operator that is given tensors of both devices fails as CUDA's own do. The
numbers are the CPU's to the bit, so a mask that differs was made another way. What would make Python wait for a real
GPU is counted, by the line of ours that asked.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils import _pytree as pytree

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# What needs its numbers in Python, or a shape that depends on them.
_WAITS = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "unique", "equal",
    "is_nonzero", "__contains__", "__repr__", "__format__", "allclose", "bincount",
}  # fmt: skip
_REFUSED = {"numpy", "__array__", "data_ptr", "__dlpack__"}
_MAY_MIX = {"copy_"}
_MOVES = {"to", "cpu", "cuda", "_to_copy"}


class Tagged(Tensor):
    """A tensor that lies on the GPU. Its memory is this CPU's; who asks for its device is told otherwise."""

    # Results are plain tensors: the mode says where each lies.
    __torch_function__ = torch._C._disabled_torch_function_impl


class FakeGPU(TorchFunctionMode):
    """The mode. ``waited``: how often Python would have waited for the GPU, by (file, line, function).

    Args:
        free: bytes of its memory.
    """

    def __init__(self, free: int = 1 << 34) -> None:
        super().__init__()
        self.waited: Counter[tuple[str, int, str]] = Counter()
        own = {
            "mem_get_info": (free, free),
            "memory_reserved": 0,
            "memory_allocated": 0,
            "reset_peak_memory_stats": None,
            "max_memory_allocated": free // 2,
        }
        self._patches = [patch.object(torch.cuda, name, return_value=value) for name, value in own.items()]
        # A model is traced on the CPU; torch.export has modes of its own.
        self._patches.append(patch.object(torch.export, "export", _outside(torch.export.export)))

    def __enter__(self) -> FakeGPU:
        for one in self._patches:
            one.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        given = [*_tensors((*args, *kwargs.values()))]
        there = [tensor for tensor in given if isinstance(tensor, Tagged)]
        if func is torch.device:
            return func(*args, **kwargs)
        if name in ("device", "is_cuda", "is_cpu"):
            on = GPU if there else CPU
            return on if name == "device" else on.type == name[3:]
        if name in _MOVES:
            return self._moved(func, args, kwargs)
        if there and len(there) < len(given) and name not in _MAY_MIX:
            strangers = [t for t in given if not isinstance(t, Tagged) and t.dim()]
            if strangers:
                shapes = [tuple(t.shape) for t in strangers]
                raise RuntimeError(f"Expected all tensors to be on the same device, {name} has {shapes} on the CPU")
        if there and name in _REFUSED:
            raise TypeError(f"can't convert cuda:0 device type tensor: {name}")
        if there and (name in _WAITS or (name in ("__getitem__", "__setitem__") and _by_mask(args))):
            self._wait(name)
        asked = _asked(args, kwargs)
        args, kwargs = pytree.tree_map(_on_cpu, (args, kwargs)) if asked is not None else (args, kwargs)
        return _tagged(func(*args, **kwargs), bool(there) if asked is None else asked.type == "cuda")

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``to`` in all of its forms: a copy where the device is another one."""
        value, *rest = args
        to = _asked(tuple(rest), kwargs) or {"cpu": CPU, "cuda": GPU}.get(_name(func))
        if rest and isinstance(rest[0], Tensor):
            to, rest[0] = GPU if isinstance(rest[0], Tagged) else CPU, rest[0].dtype
        here = isinstance(value, Tagged)
        there = here if to is None else to.type == "cuda"
        if here != there and not kwargs.get("non_blocking"):
            self._wait("to the GPU" if there else "to the CPU")
        result = value
        if _name(func) in ("to", "_to_copy"):
            rest, kwargs = pytree.tree_map(_on_cpu, (rest, kwargs))
            result = func(value, *rest, **kwargs)
        return _tagged(result.clone() if here != there and result is value else result, there)

    def _wait(self, what: str) -> None:
        frame = sys._getframe(2)
        # By the module's name: the folder of a clone is called sparsify as well.
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] != "sparsify":
            frame = frame.f_back
        self.waited[frame.f_code.co_filename, frame.f_lineno, what] += 1


def moved(module: Any) -> Any:
    """``module`` with its parameters and buffers on the GPU; call it under the mode."""
    tied: dict[int, Tensor] = {}
    for own in module.modules():
        for tensors in (own._parameters, own._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = tensor.detach().to(GPU)
                    there = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
                    tensors[name] = tied.setdefault(id(tensor), there)
    return module


def _outside(export: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: Any, args: tuple[Any, ...], *more: Any, **options: Any) -> Any:
        given = [*module.parameters(), *_tensors((args, *(list(m.values()) for m in more if isinstance(m, dict))))]
        if len({isinstance(tensor, Tagged) for tensor in given}) > 1:
            raise RuntimeError("Unhandled FakeTensor Device Propagation: found two different devices cuda:0, cpu")
        with _pop_mode_temporarily():
            return export(module, args, *more, **options)

    return call


def _name(func: Callable[..., Any]) -> str:
    """``to`` for ``Tensor.to`` and ``aten.to.dtype`` alike; a property by its own name."""
    packet = getattr(func, "overloadpacket", None)
    if packet is not None:
        return str(packet.__name__)
    name = getattr(func, "__name__", str(func))
    return str(func.__self__.__name__) if name == "__get__" else name  # type: ignore[attr-defined]


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"))


def _asked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    found = [torch.device(value) for value in (*args, kwargs.get("device")) if _is_device(value)]
    return found[0] if found else None


def _on_cpu(value: Any) -> Any:
    return CPU if _is_device(value) else value


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether a subscript is a mask, whose true places must be counted; a number put there is no subscript."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    masks = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)
    return masks and not (len(args) == 3 and not (isinstance(args[2], Tensor) and args[2].dim()))


def _tagged(result: Any, there: bool) -> Any:
    """Every tensor in ``result`` where it lies."""
    if isinstance(result, Tensor):
        return result if isinstance(result, Tagged) == there else result.as_subclass(Tagged if there else Tensor)
    return pytree.tree_map_only(Tensor, lambda t: _tagged(t, there), result)


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor among arguments."""
    for value in given:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
