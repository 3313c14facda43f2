"""Dense products of 16-bit numbers on processors that have no instructions for them: in float32, rounded once.

Where oneDNN has no kernels for a dtype (bfloat16 before AVX-512, float16 on most), torch multiplies one number at a
time: on a Zen 3 8 times slower than float32 for ``F.linear``, 30 times for convolutions, 60 to 90 times for matrices
that are not transposed and for stacks of experts (docs/benchmarks.md). It adds up in float32 and rounds the sum, and so
does this, in another order: the numbers stay those of their dtype.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

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


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, axis: int = 0) -> Tensor:
    """``x`` [..., in_features] by ``weight`` [out_features, in_features], in their dtype.

    Args:
        axis: which axis of ``weight`` is that of out_features.
    """
    count, inner = weight.shape[axis], weight.shape[1 - axis]
    size = max(64, _PIECE // max(1, inner))
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if t is not None)
    own = x.float()
    if wanted or count <= size:
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
