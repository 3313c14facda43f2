"""What the CPU kernels are called with, and what they answer."""

from __future__ import annotations

from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime.cpu import native


def dtype_code(x: Tensor, values: Tensor, bias: Tensor | None) -> int:
    if x.dtype != values.dtype or (bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous())):
        found = f"x of {x.dtype}, weights of {values.dtype}" + ("" if bias is None else f", bias of {bias.dtype}")
        raise BackendError("a product with packed weights", found=found, do="Give all of one dtype, and contiguous")
    kind = native.KINDS.get(x.dtype)
    if kind is None:
        raise BackendError("a product with packed weights", found=str(x.dtype), do="Use float32, bfloat16 or float16")
    return kind


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def disagreement(x: Tensor, values: Tensor, codes: Tensor) -> BackendError:
    return BackendError(
        f"a product of x {list(x.shape)} with packed weights",
        found=f"values {list(values.shape)} and codes {list(codes.shape)} of {codes.dtype}: not one matrix for x",
        do="Give the tensors of one packed matrix, and x of its inputs",
    )


def failure(code: int, x: Tensor, values: Tensor, codes: Tensor) -> BackendError:
    if code != 2:
        return disagreement(x, values, codes)
    return BackendError("a product with packed weights", found="not enough memory", do="Free some, or use fewer tokens")
