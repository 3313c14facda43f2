"""The operators that a lowered graph calls, ``torch.ops.sparsify.*``:

- ``linear_24``, ``linear_bitmask``: y = x Wᵀ + b with W packed (:mod:`sparsify.runtime.layout`);
- ``experts_24``, ``experts_bitmask``: the same for a stack of W, tokens sorted by expert, as ``grouped_mm`` does it;
- ``linear_dense``: a dense product whose case of one token runs our own kernel.

Any leading dimensions, any number of tokens, bias or none, for inference: no gradient is defined. On CPUs they run the
kernels of :mod:`sparsify.runtime.cpu.native`; on every other device a plain reference.
They are defined by schema and not by ``custom_op``, which costs some ten microseconds a call. On GPUs ``linear_24``
runs what :mod:`sparsify.runtime.cuda.ops` registers, and weights that were prepared for a GPU run its ``linear_24_prepared``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.nn.functional import linear

from sparsify.errors import BackendError
from sparsify.runtime.cpu import native
from sparsify.runtime.cuda.ops import register_portable
from sparsify.runtime.layout import Packed, unpack

# Up to FEW tokens are multiplied with weights that stay packed; up to MANY with four rows at a time unpacked inside the
# kernel; above, PANEL rows at a time are unpacked into a buffer that all panels share, for a dense product.
FEW_24, FEW_BITMASK = 16, 8
MANY = 64
PANEL = 512


def _reference_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, unpack(Packed("packed24", (values.shape[0], x.shape[-1]), values, meta)), bias)


def _reference_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x, unpack(Packed("bitmask", (mask.shape[0], x.shape[-1]), values, mask)), bias)


def _reference_experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> Tensor:
    return _by_expert(x, values.shape[1], offsets, lambda e, rows: _reference_24(rows, values[e], meta[e]))


def _reference_experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, offsets: Tensor) -> Tensor:
    experts, rows = mask.shape[:2]
    full = unpack(Packed("bitmask", (experts * rows, x.shape[-1]), values, mask.flatten(0, 1))).view(experts, rows, -1)
    return _by_expert(x, rows, offsets, lambda e, part: linear(part, full[e]))


def _by_expert(x: Tensor, rows: int, offsets: Tensor, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``product(e, tokens of expert e)``, put together. Tokens past the last offset belong to no expert: zeros."""
    y = x.new_zeros(x.shape[0], rows)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            y[start:end] = product(expert, x[start:end])
        start = max(start, end)
    return y


def _cpu_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    if library is None:
        return _reference_24(x, values, meta, bias)
    rows, columns, width = values.shape[0], values.shape[1] * 2, x.shape[-1]
    kind = _kind(x, values, bias)
    if meta.shape[0] != rows or meta.shape[1] * 8 != columns or meta.dtype is not torch.uint8:
        raise _disagreement(x, values, meta)
    values, meta, x = values.contiguous(), meta.contiguous(), x.contiguous()
    tokens = x.numel() // width
    if tokens > MANY:
        return _by_panels(x, values, meta, None, rows, columns, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    failed = library.linear_24(
        native.isa(), kind, values.data_ptr(), meta.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(),
        tokens, rows, width, columns, FEW_24, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise _failure(failed, x, values, meta)
    return y


def _cpu_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    if library is None:
        return _reference_bitmask(x, values, mask, rowptr, bias)
    rows, columns, width = mask.shape[0], mask.shape[1] * 32, x.shape[-1]
    kind = _kind(x, values, bias)
    if mask.dtype is not torch.int32 or rowptr.dtype is not torch.int64 or rowptr.numel() != rows + 1:
        raise _disagreement(x, values, mask)
    values, mask, rowptr, x = values.contiguous(), mask.contiguous(), rowptr.contiguous(), x.contiguous()
    tokens = x.numel() // width
    if tokens > MANY:
        return _by_panels(x, values, mask, rowptr, rows, columns, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    failed = library.linear_bitmask(
        native.isa(), kind, values.data_ptr(), values.numel(), mask.data_ptr(), rowptr.data_ptr(), x.data_ptr(),
        _pointer(bias), y.data_ptr(), tokens, rows, width, columns, FEW_BITMASK, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise _failure(failed, x, values, mask)
    return y


def _cpu_experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> Tensor:
    return _by_expert(x, values.shape[1], offsets, lambda e, rows: _cpu_24(rows, values[e], meta[e]))


def _cpu_experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, offsets: Tensor) -> Tensor:
    if native.library() is None:
        return _reference_experts_bitmask(x, values, mask, rowptr, offsets)
    rows = mask.shape[1]

    def product(expert: int, part: Tensor) -> Tensor:
        return _cpu_bitmask(part, values, mask[expert], rowptr[expert * rows : (expert + 1) * rows + 1])

    return _by_expert(x, rows, offsets, product)


def _cpu_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    library = native.library()
    columns = weight.shape[1]
    if library is None or x.numel() != columns or x.dtype not in native.KINDS or not weight.is_contiguous():
        return linear(x, weight, bias)
    kind, isa = _kind(x, weight, bias), native.isa()
    if isa == 0:
        return linear(x, weight, bias)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    failed = library.linear_dense(
        isa, kind, weight.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(), weight.shape[0], columns,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise _failure(failed, x, weight, weight)
    return y


def _by_panels(
    x: Tensor, values: Tensor, codes: Tensor, rowptr: Tensor | None, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """The product with PANEL rows at a time unpacked: the memory of one panel, whatever the matrix."""
    width = x.shape[-1]
    if not columns - 64 < width <= columns:
        raise _disagreement(x, values, codes)
    x2 = x.reshape(-1, width)
    y = x.new_empty(x2.shape[0], rows)
    panel = values.new_empty(min(PANEL, rows), columns)
    for first in range(0, rows, PANEL):
        count = min(PANEL, rows - first)
        _unpack_rows(values, codes, rowptr, panel, first, count)
        part = None if bias is None else bias[first : first + count]
        y[:, first : first + count] = linear(x2, panel[:count, :width], part)
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
        raise _failure(failed, out, values, codes)


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


def _disagreement(x: Tensor, values: Tensor, codes: Tensor) -> BackendError:
    return BackendError(
        f"a product of x {list(x.shape)} with packed weights",
        found=f"values {list(values.shape)} and codes {list(codes.shape)} of {codes.dtype}: not one matrix for x",
        do="Give the tensors of one packed matrix, and x of its inputs",
    )


def _failure(code: int, x: Tensor, values: Tensor, codes: Tensor) -> BackendError:
    if code != 2:
        return _disagreement(x, values, codes)
    return BackendError("a product with packed weights", found="not enough memory", do="Free some, or use fewer tokens")


def _fake_24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.shape[-1] <= values.shape[1] * 2, lambda: f"x {x.shape} for weights of {values.shape[1] * 2} inputs")
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _fake_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.shape[-1] <= mask.shape[1] * 32, lambda: f"x {x.shape} for weights of {mask.shape[1] * 32} inputs")
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def _fake_experts_24(x: Tensor, values: Tensor, meta: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[1])


def _fake_experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, rowptr: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], mask.shape[1])


def _fake_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x {x.shape} for weights {weight.shape}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# Operators are torch's own registry; this object only keeps them alive.
_library = Library("sparsify", "DEF")
for _schema, _reference, _cpu, _fake in (
    ("linear_24(Tensor x, Tensor values, Tensor meta, Tensor? bias=None) -> Tensor", _reference_24, _cpu_24, _fake_24),
    ("linear_bitmask(Tensor x, Tensor values, Tensor mask, Tensor rowptr, Tensor? bias=None) -> Tensor",
     _reference_bitmask, _cpu_bitmask, _fake_bitmask),
    ("experts_24(Tensor x, Tensor values, Tensor meta, Tensor offsets) -> Tensor",
     _reference_experts_24, _cpu_experts_24, _fake_experts_24),
    ("experts_bitmask(Tensor x, Tensor values, Tensor mask, Tensor rowptr, Tensor offsets) -> Tensor",
     _reference_experts_bitmask, _cpu_experts_bitmask, _fake_experts_bitmask),
    ("linear_dense(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear, _cpu_dense, _fake_dense),
):  # fmt: skip
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    _library.impl(_name, _cpu, "CPU")
    register_fake(f"sparsify::{_name}", _fake, lib=_library)
register_portable(_library)

linear_24 = torch.ops.sparsify.linear_24.default
linear_bitmask = torch.ops.sparsify.linear_bitmask.default
experts_24 = torch.ops.sparsify.experts_24.default
experts_bitmask = torch.ops.sparsify.experts_bitmask.default
linear_dense = torch.ops.sparsify.linear_dense.default
