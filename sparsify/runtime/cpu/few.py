"""Products of activations with packed weights of 8 or 4 bits by the CPU kernels; in plain torch where there are none.

Each refuses what cannot be one product first (:mod:`sparsify.runtime.arguments`). ``group`` 0: one scale for a row.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sparsify.runtime import reference
from sparsify.runtime.arguments import disagreement, failure
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.asked_once import KnownCodes, KnownFew
from sparsify.runtime.cpu.wide import empty_product, multiplier
from sparsify.runtime.few_arguments import (
    check_24_few,
    check_bitmask_few,
    check_dense_few,
    check_experts_24_few,
    check_experts_bitmask_few,
    check_experts_dense_few,
)
from sparsify.runtime.words import Layout

# Up to FEW tokens are multiplied with weights that stay packed; above, PANEL rows at a time are made dense in a buffer
# that all panels share, for a dense product. packed24 with AVX-512 is never made dense: the tokens lie across vectors.
FEW = 16
PANEL = 512
# As the kernels call them (FewLayout in few.h).
_LAYOUTS = {"packed24": 0, "bitmask": 1, "dense": 2}
# Dtype, layout, bits, group; then address and length of values, codes, starts and scales.
Given: TypeAlias = ctypes.Array[ctypes.c_int64]
_Numbers = ctypes.c_int64 * 12

_codes, _known = KnownCodes(), KnownFew()


@dataclass(frozen=True)
class _Matrix:
    """One matrix as the kernels take it. ``codes``: none for dense; ``starts``: of a bitmask alone."""

    layout: Layout
    bits: int
    group: int
    values: Tensor
    codes: Tensor | None
    starts: Tensor | None
    scales: Tensor

    def given(self) -> Given:
        """What every kernel takes after the instruction set."""
        tensors = (self.values, self.codes, self.starts, self.scales)
        where = [(0, 0) if t is None else (t.data_ptr(), t.numel()) for t in tensors]
        # Values and codes are counted in bytes: a value of 8 bits or two of 4 are one, a word of a mask is four.
        if self.codes is not None:
            where[1] = (self.codes.data_ptr(), self.codes.nbytes)
        kind = native.KINDS[self.scales.dtype]
        return _Numbers(kind, _LAYOUTS[self.layout], self.bits, self.group, *(n for pair in where for n in pair))


def linear_24_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    meta: Tensor,
    bits: int,
    group: int,
    exact: bool,
    bias: Tensor | None = None,
) -> Tensor:
    parts = (values, meta, None)
    given = _known.given(x, scales, parts, bits, group, bias)
    if given is None:
        check_24_few(x, scales, values, meta, bits, group, exact, bias)
    _codes.check(meta)
    if native.library() is None:
        return reference.linear_24_few(x, scales, values, meta, bits, group, exact, bias)
    return _product("packed24", x, scales, parts, bits, group, exact, bias, given)


def linear_bitmask_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    bits: int,
    group: int,
    exact: bool,
    bias: Tensor | None = None,
) -> Tensor:
    parts = (values, mask, starts)
    given = _known.given(x, scales, parts, bits, group, bias)
    if given is None:
        check_bitmask_few(x, scales, values, mask, starts, bits, group, exact, bias)
    if native.library() is None:
        return reference.linear_bitmask_few(x, scales, values, mask, starts, bits, group, exact, bias)
    return _product("bitmask", x, scales, parts, bits, group, exact, bias, given)


def linear_dense_few(
    x: Tensor, scales: Tensor, values: Tensor, bits: int, group: int, exact: bool, bias: Tensor | None = None
) -> Tensor:
    parts = (values, None, None)
    given = _known.given(x, scales, parts, bits, group, bias)
    if given is None:
        check_dense_few(x, scales, values, bits, group, exact, bias)
    if native.library() is None:
        return reference.linear_dense_few(x, scales, values, bits, group, exact, bias)
    return _product("dense", x, scales, parts, bits, group, exact, bias, given)


def experts_24_few(
    x: Tensor, scales: Tensor, values: Tensor, meta: Tensor, bits: int, group: int, exact: bool, offsets: Tensor
) -> Tensor:
    check_experts_24_few(x, scales, values, meta, bits, group, exact, offsets)
    _codes.check(meta)
    if native.library() is None:
        return reference.experts_24_few(x, scales, values, meta, bits, group, exact, offsets)

    def product(e: int, part: Tensor) -> Tensor:
        return _linear(part, _matrix("packed24", scales[e], values[e], meta[e], None, bits, group), exact, None)

    return reference.by_expert(x, scales.shape[1], offsets, product)


def experts_bitmask_few(
    x: Tensor,
    scales: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    bits: int,
    group: int,
    exact: bool,
    offsets: Tensor,
) -> Tensor:
    check_experts_bitmask_few(x, scales, values, mask, starts, bits, group, exact, offsets)
    if native.library() is None:
        return reference.experts_bitmask_few(x, scales, values, mask, starts, bits, group, exact, offsets)
    rows = scales.shape[1]
    values, starts = values.contiguous(), starts.contiguous()

    def product(e: int, part: Tensor) -> Tensor:
        own = starts[e * rows : (e + 1) * rows + 1]
        return _linear(part, _matrix("bitmask", scales[e], values, mask[e], own, bits, group), exact, None)

    return reference.by_expert(x, rows, offsets, product)


def experts_dense_few(
    x: Tensor, scales: Tensor, values: Tensor, bits: int, group: int, exact: bool, offsets: Tensor
) -> Tensor:
    check_experts_dense_few(x, scales, values, bits, group, exact, offsets)
    if native.library() is None:
        return reference.experts_dense_few(x, scales, values, bits, group, exact, offsets)

    def product(e: int, part: Tensor) -> Tensor:
        return _linear(part, _matrix("dense", scales[e], values[e], None, None, bits, group), exact, None)

    return reference.by_expert(x, scales.shape[1], offsets, product)


def unpack_few(
    layout: Layout,
    scales: Tensor,
    values: Tensor,
    codes: Tensor | None,
    starts: Tensor | None,
    bits: int,
    group: int,
    width: int,
) -> Tensor:
    """The matrix [rows, width] in the dtype of ``scales``: the bits of the reference, sooner.

    Raises:
        BackendError: the tensors are not those of one matrix.
    """
    given = [t for t in (scales, values, codes, starts) if t is not None]
    if any(t.layout is not torch.strided or t.device != scales.device for t in given):
        raise disagreement(scales, values, scales if codes is None else codes)
    x = scales.new_empty(0, width)
    if layout == "packed24":
        assert codes is not None, "packed24 has codes"
        check_24_few(x, scales, values, codes, bits, group, True)
        _codes.check(codes)
    elif layout == "bitmask":
        assert codes is not None and starts is not None, "a bitmask has a mask and starts"
        check_bitmask_few(x, scales, values, codes, starts, bits, group, True)
    else:
        check_dense_few(x, scales, values, bits, group, True)
    if scales.device.type != "cpu" or native.library() is None:
        return reference.unpack_few(layout, scales, values, codes, bits, group, width)
    out = scales.new_empty(scales.shape[0], width)
    _unpack_rows(_matrix(layout, scales, values, codes, starts, bits, group), out, 0, scales.shape[0])
    return out


def _matrix(
    layout: Layout, scales: Tensor, values: Tensor, codes: Tensor | None, starts: Tensor | None, bits: int, group: int
) -> _Matrix:
    return _Matrix(
        layout,
        bits,
        group,
        values.contiguous(),
        None if codes is None else codes.contiguous(),
        None if starts is None else starts.contiguous(),
        scales.contiguous(),
    )


def _product(
    layout: Layout,
    x: Tensor,
    scales: Tensor,
    parts: tuple[Tensor | None, ...],
    bits: int,
    group: int,
    exact: bool,
    bias: Tensor | None,
    given: Given | None,
) -> Tensor:
    """The product with a matrix that is constant; ``given``: what is known of it."""
    values, codes, starts = parts
    assert values is not None, "every layout has values"
    if given is not None and (x.numel() <= FEW * x.shape[-1] or _any_number(layout, x)):
        return _multiply(x, given, scales.shape[0], exact, bias, values, scales if codes is None else codes)
    w = _matrix(layout, scales, values, codes, starts, bits, group)
    # What had to be copied lies there for this product alone.
    lies = (w.scales, w.values, w.codes, w.starts)
    if given is None and all(a is b for a, b in zip(lies, (scales, *parts), strict=True)):
        _known.remember(scales, parts, bits, group, x.shape[-1], w.given())
    return _linear(x, w, exact, bias)


def _any_number(layout: Layout, x: Tensor) -> bool:
    return layout == "packed24" and native.any_number_24(x.dtype)


def _linear(x: Tensor, w: _Matrix, exact: bool, bias: Tensor | None) -> Tensor:
    if x.numel() > FEW * x.shape[-1] and not _any_number(w.layout, x):
        return _by_panels(x, w, bias)
    codes = w.scales if w.codes is None else w.codes
    return _multiply(x, w.given(), w.scales.shape[0], exact, bias, w.values, codes)


def _multiply(
    x: Tensor, given: Given, rows: int, exact: bool, bias: Tensor | None, values: Tensor, codes: Tensor
) -> Tensor:
    """The product by the kernels. ``given``: see :meth:`_Matrix.given`, whose tensors the caller holds; ``values`` and
    ``codes`` are of these, for what is said of them.
    """
    library = native.library()
    assert library is not None, "callers run only where there are kernels"
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    *lead, width = x.shape
    y = empty_product(x, lead, rows)
    failed = library.linear_few(
        native.isa(),
        given,
        x.data_ptr(),
        x.numel(),
        0 if bias is None else bias.data_ptr(),
        -1 if bias is None else bias.numel(),
        y.data_ptr(),
        rows,
        width,
        FEW,
        exact,
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed, x, values, codes)
    return y


def _unpack_rows(w: _Matrix, out: Tensor, first: int, count: int) -> None:
    """Rows [first, first + count) into ``out`` [at least count, width], contiguous."""
    library = native.library()
    assert library is not None, "callers run only where there are kernels"
    rows, width, threads = w.scales.shape[0], out.shape[1], torch.get_num_threads()
    failed = library.unpack_few(
        native.isa(), *w.given(), out.data_ptr(), out.numel(), rows, width, first, count, threads
    )
    if failed:
        raise failure(failed, out, w.values, w.scales if w.codes is None else w.codes)


def _by_panels(x: Tensor, w: _Matrix, bias: Tensor | None) -> Tensor:
    """The product with PANEL rows at a time unpacked: the memory of one panel, whatever the matrix."""
    width, rows = x.shape[-1], w.scales.shape[0]
    x2 = x.reshape(-1, width)
    y = x.new_empty(x2.shape[0], rows)
    panel = w.scales.new_empty(min(PANEL, rows), width)
    multiply = multiplier(x2)
    for first in range(0, rows, PANEL):
        count = min(PANEL, rows - first)
        _unpack_rows(w, panel, first, count)
        part = None if bias is None else bias[first : first + count]
        y[:, first : first + count] = multiply(panel[:count], part)
    return y.view(*x.shape[:-1], rows)
