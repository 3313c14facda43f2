"""Dense products of 16-bit numbers on processors that have no instructions for them: in float32, rounded once.

Where oneDNN has no kernels for a dtype (bfloat16 before AVX-512, float16 on most), torch multiplies one number at a
time: on a Zen 3 8 times slower than float32 for ``F.linear``, 30 times for convolutions, 70 to 90 times for matrices
that are not transposed and for stacks of experts (docs/benchmarks.md). It adds up in float32 and rounds the sum, and so
do these, in another order: the numbers stay those of their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsify.runtime.arguments import wants_gradient

# Numbers of a weight that are widened at once where no derivative is wanted: 32 MiB of float32.
_PIECE = 1 << 23


@lru_cache(maxsize=1)
def slow_dtypes() -> frozenset[torch.dtype]:
    """Dtypes in which this machine's processor multiplies one number at a time."""
    onednn = torch.ops.mkldnn
    has = torch.backends.mkldnn.is_available()
    known = {
        torch.bfloat16: has and onednn._is_mkldnn_bf16_supported(),
        torch.float16: has and onednn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in known.items() if not supported)


def wide_products() -> AbstractContextManager[object]:
    """Everything that this thread multiplies on the processor meanwhile goes this way, where it is faster."""
    slow = slow_dtypes()
    return _Widening(slow) if slow else nullcontext()


class _Widening(TorchFunctionMode):
    def __init__(self, slow: frozenset[torch.dtype]) -> None:
        super().__init__()
        self.slow = slow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        run = widened(getattr(func, "__name__", ""), func)
        if run is None or "out" in given or not self._are_slow([*args, *given.values()]):
            return func(*args, **given)
        return run(*args, **given)

    def _are_slow(self, values: list[Any]) -> bool:
        """Whether all numbers among ``values`` are of one dtype that is slow, and on the processor."""
        flat = [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
        tensors = [value for value in flat if isinstance(value, Tensor) and value.is_floating_point()]
        plain = all(type(value) in (Tensor, torch.nn.Parameter) and value.is_cpu for value in tensors)
        return plain and len({value.dtype for value in tensors}) == 1 and tensors[0].dtype in self.slow


def widened(name: str, target: Callable[..., Any]) -> Callable[..., Any] | None:
    """What computes the product ``target``, an operator or a function called ``name``, by way of float32; None for
    everything else."""
    if name in _OWN:
        return _OWN[name]
    return _whole(target) if name in _WHOLE else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: ``x`` [..., in_features], ``weight`` [out_features, in_features], all of one 16-bit dtype."""
    return product(x, weight, bias) if weight.dim() == 2 else _whole(functional.linear)(x, weight, bias)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``: [n, in_features] and [in_features, out_features]."""
    return product(x, weight, axis=1)


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta · bias + alpha · x @ weight``."""
    if bias.dim() == 1 and beta == 1 and alpha == 1:
        return product(x, weight, bias, axis=1)
    found: Tensor = _whole(torch.addmm)(bias, x, weight, beta=beta, alpha=alpha)
    return found


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


def multiplier(x: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """``F.linear`` of ``x`` by one weight and bias after the other.

    Where its dtype is slow it is widened once, and what comes is float32, to be rounded where it is put.
    """
    return partial(_piece, x.float(), axis=0) if x.dtype in slow_dtypes() else partial(functional.linear, x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, axis: int = 0) -> Tensor:
    """``x`` [..., in_features] by ``weight`` [out_features, in_features], in their dtype.

    Args:
        axis: which axis of ``weight`` is that of out_features.
    """
    if wants_gradient(x, weight, bias):
        found: Tensor = _Product.apply(x, weight, bias, axis)
        return found
    return _product(x, weight, bias, axis)


class _Product(torch.autograd.Function):
    """What waits for the derivatives stays as narrow as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis = axis
        return _product(x, weight, bias, axis)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        own = gradient.float().reshape(-1, gradient.shape[-1])
        found: list[Tensor | None] = [None, None, None]
        if of_x:
            wide = weight.float() if ctx.axis == 0 else weight.float().t()
            found[0] = (own @ wide).view(x.shape).to(x.dtype)
        if of_weight:
            rows = x.float().reshape(-1, x.shape[-1])
            found[1] = (own.t() @ rows if ctx.axis == 0 else rows.t() @ own).to(weight.dtype)
        if of_bias:
            found[2] = own.sum(dim=0).to(gradient.dtype)
        return found[0], found[1], found[2], None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    count, inner = weight.shape[axis], weight.shape[1 - axis]
    size = max(64, _PIECE // max(1, inner))
    own = x.float()
    if count <= size:
        return _piece(own, weight, bias, axis).to(x.dtype)
    result = x.new_empty(*x.shape[:-1], count)
    for start in range(0, count, size):
        length = min(size, count - start)
        part = None if bias is None else bias.narrow(0, start, length)
        result.narrow(-1, start, length).copy_(_piece(own, weight.narrow(axis, start, length), part, axis))
    return result


def _piece(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    turned = weight.float() if axis == 0 else weight.float().t()
    return functional.linear(x, turned, None if bias is None else bias.float())


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


_OWN: dict[str, Callable[..., Any]] = {"linear": linear, "mm": mm, "addmm": addmm}
_OWN |= dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), grouped)
_WHOLE = frozenset({"bmm", "baddbmm", "matmul", "__matmul__", "einsum", "convolution"}) | {
    f"conv{turned}{dims}d" for turned in ("", "_transpose") for dims in (1, 2, 3)
}


def empty_product(x: Tensor, lead: list[int], rows: int) -> Tensor:
    """[*lead, rows] in the dtype of ``x``: by its strides, which torch takes half the time for."""
    strides, size = [1], rows
    for length in reversed(lead):
        strides.insert(0, size)
        size *= length
    return x.new_empty_strided((*lead, rows), strides)
