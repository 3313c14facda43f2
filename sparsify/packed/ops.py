"""The operators that a lowered graph calls: ``sparsify::linear_24``, ``sparsify::linear_bitmask``, ``sparsify::linear_dense``.

Any leading dimensions, any number of tokens, bias or none. On CPUs they run the kernels of :mod:`sparsify.packed.native`; on every
other device a plain reference, until a backend registers better. They are defined by schema and not by ``custom_op``, which
costs some ten microseconds a call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, register_fake

from sparsify.errors import BackendError
from sparsify.packed import native
from sparsify.packed.layout import PADDING, Packed, unpack

# Up to FEW tokens are multiplied with weights that stay packed; up to MANY with four rows at a time unpacked inside the
# kernel; above, PANEL rows at a time are unpacked into a buffer that all panels share, for a dense product.
FEW_24, FEW_BITMASK = 16, 4
MANY = 64
PANEL = 512

_library = Library("sparsify", "DEF")
_library.define("linear_24(Tensor x, Tensor values, Tensor meta, Tensor? bias=None) -> Tensor")
_library.define("linear_bitmask(Tensor x, Tensor values, Tensor mask, Tensor rowptr, Tensor? bias=None) -> Tensor")
_library.define("linear_dense(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


def _reference(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, unpack(packed), bias)


def _reference_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    return _reference(x, Packed("packed24", (values.shape[0], x.shape[-1]), values, meta), bias)


def _reference_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    return _reference(x, Packed("bitmask", (mask.shape[0], x.shape[-1]), values, mask), bias)


def _cpu_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    if library is None:
        return _reference_24(x, values, meta, bias)
    rows, columns = values.shape[0], values.shape[1] * 2
    width = x.shape[-1]
    tokens = x.numel() // width
    values, meta, x = values.contiguous(), meta.contiguous(), x.contiguous()
    kind = _kind(x, values, bias)
    if tokens > MANY:
        return _by_panels(x, values, meta, None, rows, columns, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    failed = library.linear_24(
        native.isa(), kind, values.data_ptr(), meta.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(),
        tokens, rows, width, columns, FEW_24, torch.get_num_threads(),
    )  # fmt: skip
    return y if not failed else _refuse(failed, x, [rows, columns])


def _cpu_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    if library is None:
        return _reference_bitmask(x, values, mask, rowptr, bias)
    rows, columns = mask.shape[0], mask.shape[1] * 32
    width = x.shape[-1]
    tokens = x.numel() // width
    values, mask, x = values.contiguous(), mask.contiguous(), x.contiguous()
    kind = _kind(x, values, bias)
    if tokens > MANY:
        return _by_panels(x, values, mask, rowptr, rows, columns, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    failed = library.linear_bitmask(
        native.isa(), kind, values.data_ptr(), mask.data_ptr(), rowptr.data_ptr(), x.data_ptr(), _pointer(bias),
        y.data_ptr(), tokens, rows, width, columns, FEW_BITMASK, torch.get_num_threads(),
    )  # fmt: skip
    return y if not failed else _refuse(failed, x, [rows, columns])


def _cpu_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    isa = native.isa()
    columns = weight.shape[1]
    if library is None or isa == 0 or x.numel() != columns or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight, bias)
    kind, x = _kind(x, weight, bias), x.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    failed = library.linear_dense(
        isa, kind, weight.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(), weight.shape[0], columns,
        torch.get_num_threads(),
    )  # fmt: skip
    return y if not failed else _refuse(failed, x, list(weight.shape))


def _by_panels(
    x: Tensor, values: Tensor, codes: Tensor, rowptr: Tensor | None, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """The product with PANEL rows at a time unpacked: the memory of one panel, whatever the matrix."""
    width = x.shape[-1]
    x2 = x.reshape(-1, width)
    y = x.new_empty(x2.shape[0], rows)
    panel = values.new_empty(min(PANEL, rows), columns)
    for first in range(0, rows, PANEL):
        count = min(PANEL, rows - first)
        _unpack_rows(values, codes, rowptr, panel, first, count)
        part = None if bias is None else bias[first : first + count]
        y[:, first : first + count] = torch.nn.functional.linear(x2, panel[:count, :width], part)
    return y.view(*x.shape[:-1], rows)


def _unpack_rows(values: Tensor, codes: Tensor, rowptr: Tensor | None, out: Tensor, first: int, count: int) -> None:
    library = native.library()
    assert library is not None, "callers run only where there are kernels"
    meta, mask = (codes.data_ptr(), 0) if rowptr is None else (0, codes.data_ptr())
    failed = library.unpack(
        native.isa(), values.element_size(), values.data_ptr(), meta, mask, 0 if rowptr is None else rowptr.data_ptr(),
        out.data_ptr(), first, count, out.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        _refuse(failed, values, [count, out.shape[1]])


def unpacked(packed: Packed, rowptr: Tensor | None = None) -> Tensor:
    """:func:`unpack` by the kernels where they are: the same bits, sooner.

    Args:
        rowptr: ``row_starts`` of a bitmask, needed for one.
    """
    rows, columns = packed.shape
    on_cpu = packed.values.device.type == "cpu"
    if not on_cpu or native.library() is None or (packed.layout == "bitmask" and rowptr is None):
        return unpack(packed)
    full = packed.codes.shape[1] * (8 if packed.layout == "packed24" else 32)
    out = packed.values.new_empty(rows, full)
    _unpack_rows(packed.values.contiguous(), packed.codes.contiguous(), rowptr, out, 0, rows)
    return out[:, :columns].contiguous()


def _kind(x: Tensor, values: Tensor, bias: Tensor | None) -> int:
    if x.dtype != values.dtype or (bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous())):
        found = f"x of {x.dtype}, weights of {values.dtype}" + ("" if bias is None else f", bias of {bias.dtype}")
        raise BackendError("a product with packed weights", found=found, do="Give all of one dtype, and contiguous")
    kind = native.KINDS.get(x.dtype)
    if kind is None:
        raise BackendError("a product with packed weights", found=str(x.dtype), do="Use float32, bfloat16 or float16")
    return kind


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _refuse(code: int, x: Tensor, shape: list[int]) -> Tensor:
    found = "not enough memory" if code == 2 else f"a matrix {shape}, which the layout does not have"
    raise BackendError(f"a product of x {list(x.shape)} with packed weights", found=found, do="Pack the weights again")


def _fake_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.shape[-1] <= values.shape[1] * 2, lambda: f"x {x.shape} for weights of {values.shape[1] * 2} inputs")
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _fake_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.shape[-1] <= mask.shape[1] * 32, lambda: f"x {x.shape} for weights of {mask.shape[1] * 32} inputs")
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def _fake_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x {x.shape} for weights {weight.shape}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_library.impl("linear_24", _reference_24, "CompositeExplicitAutograd")
_library.impl("linear_bitmask", _reference_bitmask, "CompositeExplicitAutograd")
_library.impl("linear_dense", torch.nn.functional.linear, "CompositeExplicitAutograd")
_library.impl("linear_24", _cpu_24, "CPU")
_library.impl("linear_bitmask", _cpu_bitmask, "CPU")
_library.impl("linear_dense", _cpu_dense, "CPU")
register_fake("sparsify::linear_24", _fake_24, lib=_library)
register_fake("sparsify::linear_bitmask", _fake_bitmask, lib=_library)
register_fake("sparsify::linear_dense", _fake_dense, lib=_library)

linear_24 = torch.ops.sparsify.linear_24
linear_bitmask = torch.ops.sparsify.linear_bitmask
linear_dense = torch.ops.sparsify.linear_dense


def padding_is_there(values: Tensor, rowptr: Tensor) -> bool:
    """Whether a bitmask's values are as many as its rows say, the padding included."""
    return values.numel() == int(rowptr[-1]) + PADDING
