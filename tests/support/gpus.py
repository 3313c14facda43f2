"""GPUs that are not there: what is known of them, and their kernels on this CPU."""

from __future__ import annotations

import ctypes

import torch
from support import emulate
from support.matrices import pruned_24
from torch import Tensor

import sparsify.runtime.ops  # noqa: F401
from sparsify.runtime.cuda import ops
from sparsify.runtime.cuda.fragments import TILE_BYTES
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.integers import GRIDS
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare_weight
from sparsify.runtime.cuda.variants import Arguments, Launch, Variant
from sparsify.runtime.layout import pack
from sparsify.runtime.words import Policy

H200 = GPU("NVIDIA H200", (9, 0), 132, True, "cusparselt")
A100 = GPU("NVIDIA A100", (8, 0), 108, True, "cutlass")


def prepared(
    rows: int,
    columns: int,
    policy: Policy = "decode",
    target: GPU = H200,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, PreparedWeight]:
    dense = pruned_24(rows, columns, dtype, seed)
    weight = prepare_weight(pack(dense, "packed24"), policy, target=target)
    assert isinstance(weight, PreparedWeight)
    return dense, weight


class Emulated:
    """A GPU's loaded kernels, on this CPU. What a launch may touch is taken from its arguments."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.launched, self.multiprocessors = dtype, list[str](), emulate.MULTIPROCESSORS

    def launch(self, launch: Launch, arguments: Arguments) -> None:
        self.launched.append(launch.kernel)
        a, size = arguments, 2
        view = lambda at, count: torch.frombuffer((ctypes.c_uint8 * count).from_address(at), dtype=torch.uint8)  # noqa: E731
        high = -(-a.rows // 16) if a.rows else -(-(a.first + a.count) // 16)
        read = [view(a.fragments, high * a.tiles * _tile_bytes(launch.kernel, a.scales))]
        read += [view(a.x, a.tokens * a.columns * size)] if a.x else []
        read += [view(a.bias, a.rows * size)] if a.bias else []
        partial = [view(a.partial, a.splits * a.tokens * a.rows * 4)] if a.partial else []
        y = view(a.y, (a.tokens * a.rows if a.rows else a.count * a.columns) * size)
        y.fill_(0xFF)
        emulate.run(launch, arguments, self.dtype, read, [*partial, y])


def _tile_bytes(kernel: str, scales: int) -> int:
    if kernel == "add_splits" or kernel.startswith("unpack"):
        found = [g for g in GRIDS if kernel == f"unpack_int{g.bits}" and g.scales == scales]
        return found[0].tile_bytes if found else TILE_BYTES
    grid = Variant.named(kernel).grid
    return TILE_BYTES if grid is None else grid.tile_bytes


def on_gpu(weight: PreparedWeight, x: Tensor, bias: Tensor | None = None, plan: str | None = None) -> Tensor:
    return ops._cuda(x, weight.fragments, weight.compressed, weight.codes, weight.rows, plan or str(weight.plan), bias)
