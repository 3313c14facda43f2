"""The standard operators that unpack a weight when a session is made."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sparsify.backends.onnx.storage.builder import Builder


def spread_24(
    build: Builder, key: str, shape: tuple[int, ...], values: ir.Value, codes: ir.Value, wanted: ir.DataType
) -> ir.Value:
    """``values`` [groups, 2] at the positions that ``codes`` names, as a tensor of ``shape``."""
    groups, u8, i32 = math.prod(shape) // 4, ir.DataType.UINT8, ir.DataType.INT32
    shifts = np.array([0, 2, 4, 6], np.uint8)
    fours = [groups // 2, 4]
    # Masked before it is shifted: OpenVINO shifts right by a division that rounds, which is exact only of multiples.
    x = build.node("BitwiseAnd", [codes, build.constant("pairs", 3 << shifts)], f"{key}/masked", fours, u8)
    x = build.node("BitShift", [x, build.constant("shifts", shifts)], f"{key}/shifted", fours, u8, direction="RIGHT")
    x = build.reshape(x, [groups, 2], f"{key}/pairs")
    x = build.node("Cast", [x], f"{key}/positions", [groups, 2], i32, to=i32)
    zeros = build.zeros([groups, 4], wanted)
    x = build.node("ScatterElements", [zeros, x, values], f"{key}/groups", [groups, 4], wanted, axis=1)
    return build.reshape(x, list(shape), key)


def spread_bitmask(
    build: Builder, key: str, shape: tuple[int, ...], values: ir.Value, codes: ir.Value, wanted: ir.DataType
) -> ir.Value:
    """``values`` where ``codes`` has a bit set, as a tensor of ``shape``."""
    assert codes.shape is not None and values.shape is not None
    size, width, kept = math.prod(shape), int(codes.shape[0]), int(values.shape[0])
    bits = build.constant("bits", (1 << np.arange(8)).astype(np.uint8)[None])
    x = build.node("BitwiseAnd", [codes, bits], f"{key}/bits", [width, 8], ir.DataType.UINT8)
    x = build.reshape(x, [width * 8], f"{key}/flat")
    # The declared shape lets onnxruntime fold it: it folds only what it can tell the size of.
    x = build.node("NonZero", [x], f"{key}/nonzero", [1, kept], ir.DataType.INT64)
    x = build.reshape(x, [kept], f"{key}/positions")
    x = build.node("ScatterElements", [build.zeros([size], wanted), x, values], f"{key}/row", [size], wanted, axis=0)
    return build.reshape(x, list(shape), key)
