"""Products of 16-bit numbers on processors that have no instructions for them: in float32, rounded once.

Where oneDNN has no kernels for a dtype (bfloat16 before AVX-512, float16 on most), torch multiplies one number at a
time: on a Zen 3 8 times slower than float32 for ``F.linear``, 30 times for convolutions, 60 to 90 times for matrices
that are not transposed and for stacks of experts (docs/benchmarks.md). It adds up in float32 and rounds the sum, and so
do these, in another order: the model's numbers stay those of its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from sparsify.ir.operators import GROUPED_PRODUCTS, exact_name

# Numbers of a weight that are widened at once where no derivative is wanted: 32 MiB of float32.
_PIECE = 1 << 23


def slow_dtypes(device: torch.device) -> frozenset[torch.dtype]:
    """Dtypes in which ``device`` multiplies one number at a time."""
    if device.type != "cpu":
        return frozenset()
    onednn = torch.ops.mkldnn
    has = torch.backends.mkldnn.is_available()
    known = {
        torch.bfloat16: has and onednn._is_mkldnn_bf16_supported(),
        torch.float16: has and onednn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in known.items() if not supported)


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
    return _product(x, weight, bias, 0)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``: [n, in_features] and [in_features, out_features]."""
    return _product(x, weight, None, 1)


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta · bias + alpha · x @ weight``."""
    if bias.dim() == 1 and beta == 1 and alpha == 1:
        return _product(x, weight, bias, 1)
    wide = torch.addmm(bias.float(), x.float(), weight.float(), beta=beta, alpha=alpha)
    return wide.to(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """``x`` [..., in_features] by ``weight``, whose axis ``axis`` is that of out_features."""
    if weight.dim() != 2:
        return _whole(functional.linear)(x, weight, bias)
    count, inner = weight.shape[axis], weight.shape[1 - axis]
    size = max(64, _PIECE // max(1, inner))
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None)
    wide = x.float()
    if wanted or count <= size:
        return _piece(wide, weight, bias, axis).to(x.dtype)
    result = x.new_empty(*x.shape[:-1], count)
    for start in range(0, count, size):
        length = min(size, count - start)
        part = None if bias is None else bias.narrow(0, start, length)
        result.narrow(-1, start, length).copy_(_piece(wide, weight.narrow(axis, start, length), part, axis))
    return result


def _piece(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    own = weight.float()
    return functional.linear(x, own if axis == 0 else own.t(), None if bias is None else bias.float())


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
            if isinstance(value, Sequence) and not isinstance(value, str):
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
