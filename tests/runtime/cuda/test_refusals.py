"""Every refusal of the GPU side that needs no GPU to be met."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.gpus import A100, prepared

import sparsify.runtime.ops  # noqa: F401
from sparsify.errors import BackendError
from sparsify.runtime.cuda import nvrtc
from sparsify.runtime.cuda.autotune.measure import RacedMatrix, measure
from sparsify.runtime.cuda.products import run_kernel


def test_kernels_that_do_not_compile(compiler: nvrtc.NVRTC, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="it is too old for every kernel"):
        compiler.compile(torch.float16, (1, 0))
    with pytest.raises(BackendError, match=r"nvrtcGetProgramLogSize, NVRTC \d+\.\d+\): .*INVALID"):
        compiler._call("nvrtcGetProgramLogSize", None, None)
    monkeypatch.setitem(nvrtc.TYPES, torch.float16, "NoSuchType")
    with pytest.raises(BackendError, match=r"compiling the CUDA kernels \(sm_80, NVRTC") as caught:
        compiler.compile(torch.float16, (8, 0))
    assert "error" in caught.value.found and "NoSuchType" in str(caught.value.__cause__)


def test_a_layout_that_the_plan_needs_and_nobody_gave() -> None:
    _, weight = prepared(64, 64)
    x = torch.randn(3, 64).bfloat16()
    with pytest.raises(BackendError, match="no copy of the weight"):
        weight.operator(x, None, None, None, 64, str(weight.plan))
    for kernel, what in (("unpack", "fragments"), ("cutlass:0", "the compressed copy"), ("cusparselt", "compressed")):
        with pytest.raises(BackendError, match=what):
            run_kernel(kernel, x, None, None, None, 64)


class Broken:
    """A clock on which nothing runs."""

    def copies(self, read: int, held: int) -> int:
        return 1

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        raise RuntimeError("the device is gone")


def test_a_dense_product_that_does_not_run_ends_the_race() -> None:
    """A kernel that fails is left out; without the dense time there is nothing to compare with."""
    matrix = RacedMatrix(torch.randn(8, 8), None, None, None)
    with pytest.raises(RuntimeError, match="the device is gone"):
        measure(matrix, lambda kernel, held: lambda x: x, Broken(), A100, [1])
