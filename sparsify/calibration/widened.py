"""The products of a graph by way of float32, on processors that have no instructions for 16-bit numbers: see
:mod:`sparsify.runtime.cpu.wide`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from sparsify.ir.operators import GROUPED_PRODUCTS, exact_name
from sparsify.runtime.cpu import wide


def slow_dtypes(device: torch.device) -> frozenset[torch.dtype]:
    """Dtypes in which ``device`` multiplies one number at a time."""
    return wide.slow_dtypes() if device.type == "cpu" else frozenset()


def widened(node: fx.Node, slow: frozenset[torch.dtype]) -> Callable[..., Any] | None:
    """What computes the product ``node`` by way of float32; None for other operators, and where its result is of no
    dtype that is ``slow``."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in slow:
        return None
    name = exact_name(node)
    if name in _BY_PIECES:
        return _BY_PIECES[name]
    return _whole(node.target) if name in _WHOLE else None  # type: ignore[arg-type]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: ``x`` [..., in_features], ``weight`` [out_features, in_features], all of one 16-bit dtype."""
    if weight.dim() != 2:
        return _whole(functional.linear)(x, weight, bias)
    return wide.product(x, weight, bias)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``: [n, in_features] and [in_features, out_features]."""
    return wide.product(x, weight, axis=1)


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta · bias + alpha · x @ weight``."""
    if bias.dim() == 1 and beta == 1 and alpha == 1:
        return wide.product(x, weight, bias, axis=1)
    return torch.addmm(bias.float(), x.float(), weight.float(), beta=beta, alpha=alpha).to(x.dtype)


def grouped(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One product per expert: ``x`` [tokens, in_features] sorted by expert, ``weight`` [experts, in_features,
    out_features], ``offs`` [experts] where each expert's tokens end."""
    if offs is None or x.dim() != 2 or weight.dim() != 3:
        return torch._grouped_mm(x, weight, offs, bias=bias, out_dtype=out_dtype)
    ends = offs.tolist()
    parts = [mm(x[start:stop], own) for start, stop, own in zip([0, *ends], ends, weight, strict=False)]
    # Rows past the last expert are no one's.
    rest = x.new_zeros(len(x) - (ends[-1] if ends else 0), weight.shape[2])
    result = torch.cat([*parts, rest])
    return (result if bias is None else result + bias).to(out_dtype or x.dtype)


def _whole(target: Callable[..., Any]) -> Callable[..., Any]:
    """``target`` on widened arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtypes: list[torch.dtype] = []

        def widen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                dtypes.append(value.dtype)
                return value.float()
            if isinstance(value, (list, tuple)):
                return type(value)(widen(each) for each in value)
            return value

        args = tuple(widen(value) for value in args)
        kwargs = {name: widen(value) for name, value in kwargs.items()}
        result = target(*args, **kwargs)
        return result.to(dtypes[0]) if dtypes else result

    return run


_BY_PIECES: dict[str, Callable[..., Any]] = {"linear": linear, "mm": mm, "addmm": addmm}
_BY_PIECES |= dict.fromkeys(GROUPED_PRODUCTS, grouped)
_WHOLE = frozenset({"bmm", "baddbmm", "matmul", "einsum", "convolution"}) | {
    f"conv{turned}{dims}d" for turned in ("", "_transpose") for dims in (1, 2, 3)
}
