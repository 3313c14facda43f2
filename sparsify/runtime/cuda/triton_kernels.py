"""2:4 products for few tokens on the portable layout (packed24), where NVRTC is not to be had: slower than our own
kernels, and right on any GPU that Triton knows.

A group of four columns is one 32-bit word of values and a nibble of positions. Nothing is spread out to four columns:
for one token the two inputs that the nibble names are picked out of four planes of x; for several the word is split
into four planes of W, and each is multiplied with its plane of x, since a sum does not ask for the order of its
columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

MOST_TOKENS = 16


@triton.jit
def _halves(word, FLOAT16: tl.constexpr):
    """The two 16-bit values of a word, as float32."""
    if FLOAT16:
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = ((word >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def one_token(
    w,
    codes,
    x,
    bias,
    y,
    rows,
    groups,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    FLOAT16: tl.constexpr,
    BIAS: tl.constexpr,
):
    """w: int32 [rows, groups]; codes: int16 [rows, groups / 4]; x: four planes [4, groups]; GROUPS divides groups."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # A row past the end is read again and not stored: a mask would make the loads narrow.
    at = tl.minimum(row, rows - 1).to(tl.int64)
    quad = tl.arange(0, GROUPS // 4)
    place = tl.arange(0, 4)
    total = tl.zeros([ROWS, GROUPS // 4, 4], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + quad[:, None] * 4 + place[None, :]
        word = tl.load(w + at[:, None, None] * groups + group[None, :, :], eviction_policy="evict_first")
        four = tl.load(codes + at[:, None] * (groups // 4) + (start // 4 + quad)[None, :]).to(tl.int32)
        code = four[:, :, None] >> (place * 4)[None, None, :]
        first, second = code & 3, (code >> 2) & 3
        x0 = tl.load(x + group).to(tl.float32)[None, :, :]
        x1 = tl.load(x + groups + group).to(tl.float32)[None, :, :]
        x2 = tl.load(x + 2 * groups + group).to(tl.float32)[None, :, :]
        x3 = tl.load(x + 3 * groups + group).to(tl.float32)[None, :, :]
        low, high = _halves(word, FLOAT16)
        # Positions ascend: the first is not 3, the second not 0.
        total += low * tl.where(first == 0, x0, tl.where(first == 1, x1, x2))
        total += high * tl.where(second == 1, x1, tl.where(second == 2, x2, x3))
    result = tl.sum(tl.sum(total, 2), 1)
    if BIAS:
        result += tl.load(bias + at).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def few_tokens(
    w,
    codes,
    x,
    bias,
    y,
    tokens,
    rows,
    groups,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    FLOAT16: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """w: int32 [rows, groups]; codes: uint8 [rows, groups / 2]; x: [tokens, 4, groups]; GROUPS divides groups."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, rows - 1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    there = token < tokens
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        word = tl.load(w + at[:, None] * groups + group[None, :])
        two = tl.load(codes + at[:, None] * (groups // 2) + (group // 2)[None, :]).to(tl.int32)
        code = two >> (4 * (group % 2))[None, :]
        first, second = code & 3, (code >> 2) & 3
        low, high = _halves(word, FLOAT16)
        for column in tl.static_range(4):
            weight = tl.where(first == column, low, tl.where(second == column, high, 0.0))
            inputs = tl.load(
                x + (token[None, :] * 4 + column) * groups + group[:, None], mask=there[None, :], other=0.0
            )
            if WIDE:
                total = tl.dot(weight, inputs.to(tl.float32), total)
            else:
                total = tl.dot(weight.to(inputs.dtype), inputs, total)
    if BIAS:
        total += tl.load(bias + at).to(tl.float32)[:, None]
    kept = (row < rows)[:, None] & there[None, :]
    tl.store(y + token[None, :] * rows + row[:, None], total.to(y.dtype.element_ty), mask=kept)


def linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` [tokens, columns], at most MOST_TOKENS, times a packed24 matrix of the same 16-bit dtype: [tokens,
    rows].
    """
    (tokens, columns), rows, groups = x.shape, values.shape[0], values.shape[1] // 2
    planes = pad(x, (0, 4 * groups - columns)).view(tokens, groups, 4).transpose(1, 2).contiguous()
    y = x.new_empty(tokens, rows)
    half = x.dtype is torch.float16
    size = next(s for s in (256, 128, 64, 32, 16) if groups % s == 0)
    words = values.view(torch.int32)
    if tokens == 1:
        grid = (triton.cdiv(rows, 4),)
        one_token[grid](
            words,
            meta.view(torch.int16),
            planes,
            bias,
            y,
            rows,
            groups,
            ROWS=4,
            GROUPS=size,
            FLOAT16=half,
            BIAS=bias is not None,
        )
        return y
    grid = (triton.cdiv(rows, 32),)
    few_tokens[grid](
        words,
        meta,
        planes,
        bias,
        y,
        tokens,
        rows,
        groups,
        ROWS=32,
        GROUPS=min(size, 64),
        TOKENS=MOST_TOKENS,
        FLOAT16=half,
        BIAS=bias is not None,
        # Triton's interpreter, on a CPU, multiplies the bits of bfloat16.
        WIDE=x.device.type == "cpu",
    )
    return y
