"""A CPU in the place of an H200, so that all of a run has been run before a GPU comes: kernels by the emulator of the
tests, cuSPARSELt by dense products, and a clock that is made up. Nothing that it measures means anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from machine import Machine, Sizes
from support.gpus import H200, Emulated
from torch import Tensor, nn
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.runtime.cuda import driver, ops
from sparsify.runtime.cuda.gpu import GPU

# Lives as long as what it registers.
_LIBRARY = Library("sparsify", "IMPL")

SIZES = Sizes(
    shapes={"LLaMA-7B": [("qkv", 96, 512), ("o", 32, 512)], "Llama-3-8B": [("qkv", 48, 512), ("o", 32, 512)]},
    tokens=(1, 16, 64),
    checked=((16, 256), (20, 328)),
    checked_tokens=(1, 9, 17),
    square=256,
    # More layers than Dynamo compiles one function for: it would show if one compilation did not serve all.
    decoded={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 9, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 128},
    pruned={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 128},
    samples=4,
    length=32,
    steps=2,
    rounds=1,
)  # fmt: skip


@dataclass
class MadeUpClock:
    """Runs everything once and tells times that ascend."""

    told: int = 0

    def copies(self, read: int, held: int) -> int:
        return 2

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        self.told += 1
        return (10 + self.told % 7) * 1e-6


@dataclass(frozen=True)
class EmulatedMachine(Machine):
    sizes: Sizes = field(default_factory=lambda: SIZES)
    emulated: bool = True
    compiled_layers: list[nn.Module] = field(default_factory=list)

    def synchronize(self) -> None:
        """Nothing is queued."""

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        call()
        with NoWaiting():
            return call()

    def elsewhere(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def compiled(self, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.compile(call, backend="eager", fullgraph=True)

    def compile_layer(self, layer: nn.Module) -> None:
        self.compiled_layers.append(layer)
        layer.compile(fullgraph=True, backend="aot_eager")

    def measured(self, call: Callable[[], object]) -> tuple[float, int]:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began, 0

    def step_recorder(self, step: Callable[[], object]) -> Callable[[], object]:
        for _ in range(3):
            step()
        # Dynamo would compile anew, and differently, inside of it: the eager layers do the same.
        if not self.compiled_layers:
            with NoWaiting():
                step()
        return step


class NoWaiting(TorchDispatchMode):
    """What a CUDA graph's capture refuses: numbers that the host wants to know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _WAITING:
            raise AssertionError(f"{func} waits for the GPU, which a capture of a CUDA graph does not allow")
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
_WAITING = {_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.is_nonzero, _aten.masked_select}


def emulated() -> Machine:
    """For the rest of this process."""
    # Read when Triton's kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
    gpu = replace(H200, name="an emulated H200")
    modules = {dtype: Emulated(dtype) for dtype in (torch.bfloat16, torch.float16)}
    driver_module: Any = lambda dtype, device: modules[dtype]  # noqa: E731
    put(driver, "module", driver_module)
    put(GPU, "of", lambda device: gpu)
    # The operator's GPU implementation, for tensors on the CPU.
    _LIBRARY.impl("linear_24_prepared", ops._cuda, "CPU")
    put(torch.cuda, "get_device_name", lambda device: "an emulator")
    # The layout is private there: here it is the dense matrix.
    put(torch, "_cslt_compress", lambda dense: dense.clone())
    put(torch, "_cslt_sparse_mm", sparse_mm)
    # CPU builds do not have this module at all.
    bindings: Any = torch._C
    bindings._cusparselt = SimpleNamespace(mm_search=lambda *arguments: (0, 1, -1, 0))
    return EmulatedMachine(torch.device("cpu"), gpu, MadeUpClock(), target=gpu)


def put(home: Any, name: str, value: Any) -> None:
    if not hasattr(home, name):
        raise AttributeError(f"{home} has no {name} for the emulation to replace")
    setattr(home, name, value)


def sparse_mm(
    compressed: Tensor, dense: Tensor, bias: Tensor | None = None, transpose_result: bool = False, **algorithm: int
) -> Tensor:
    y = compressed @ dense
    y = y if bias is None else y + bias[:, None]
    return y.t() if transpose_result else y
