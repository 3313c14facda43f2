"""The GPU at hand, as the parts use it; ``emulation.py`` puts a CPU in its place. And how the steps of a part run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from results import FAILED, LOST, Results
from torch import Tensor, nn

import sparsify.runtime.ops  # noqa: F401 (the operators)
from sparsify.runtime.cuda.autotune.clock import Clock, GPUClock
from sparsify.runtime.cuda.dispatch import is_own
from sparsify.runtime.cuda.gpu import GPU, current_gpu
from sparsify.runtime.cuda.variants import Variant

# What a step found, by name.
Found = Mapping[str, Any]
Step = tuple[str, Callable[[], Found]]
# (layer, rows, columns) of one decoder block, siblings joined.
Shapes = Mapping[str, Sequence[tuple[str, int, int]]]
SHAPES: Shapes = {
    "LLaMA-7B": [("qkv", 12288, 4096), ("o", 4096, 4096), ("gate_up", 22016, 4096), ("down", 4096, 11008)],
    "Llama-3-8B": [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)],
    "k or v alone": [("k", 1024, 4096)],
}


@dataclass(frozen=True)
class Sizes:
    """What is measured: all of a model's size, but for a CPU that emulates a GPU."""

    shapes: Shapes = field(default_factory=lambda: SHAPES)
    tokens: Sequence[int] = (1, 8, 16, 64, 128, 256, 2048)
    # (rows, columns) of the checks: ragged ones among them.
    checked: Sequence[tuple[int, int]] = ((16, 256), (100, 1096), (4096, 4096), (1024, 11008))
    checked_tokens: Sequence[int] = (1, 2, 7, 8, 9, 16, 17, 33, 64, 200)
    square: int = 4096
    # Of configurations of Llama: the one that decodes, and the one that is pruned.
    decoded: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                                 "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
    )  # fmt: skip
    pruned: Mapping[str, int] = field(
        default_factory=lambda: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                                 "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    )  # fmt: skip
    samples: int = 32
    length: int = 2048
    # Tokens of one decode that is timed, and how often.
    steps: int = 128
    rounds: int = 5


@dataclass(frozen=True)
class Machine:
    """Where tensors lie, what the GPU has, and how time is told."""

    device: torch.device
    gpu: GPU
    clock: Clock
    sizes: Sizes = field(default_factory=Sizes)
    emulated: bool = False
    # What weights are prepared for; None for the device that they lie on.
    target: GPU | None = None

    @classmethod
    def here(cls) -> Machine:
        device = current_gpu()
        if device is None:
            raise SystemExit(
                f"no CUDA device for this torch ({torch.__version__}): run where an NVIDIA GPU is, or with --emulate"
            )
        return cls(device, GPU.of(device), GPUClock(device))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        """What ``call`` gives when it is replayed from a CUDA graph, into memory that was poisoned before."""
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        y.fill_(float("nan"))
        graph.replay()
        return y

    def elsewhere(self, call: Callable[[], Tensor]) -> Tensor:
        """What ``call`` gives on another stream."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            y = call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return y

    def compiled(self, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``call`` through torch.compile, as CUDA graphs."""
        return torch.compile(call, mode="reduce-overhead", fullgraph=True)

    def compile_layer(self, layer: nn.Module) -> None:
        layer.compile(fullgraph=True)

    def measured(self, call: Callable[[], object]) -> tuple[float, int]:
        """Seconds of ``call``, and the most GPU memory that torch held meanwhile, in bytes."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated(self.device)

    def step_recorder(self, step: Callable[[], object]) -> Callable[[], object]:
        """``step`` as a CUDA graph's replay, after it has run on a stream of its own until nothing is compiled."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def alive(self) -> bool:
        """Whether the GPU's context still does anything."""
        try:
            torch.ones(8, device=self.device).sum().item()
        except RuntimeError:
            return False
        return True


def families_of(kernel: str) -> set[str]:
    """The parts of the GPU that ``kernel`` needs, as part ``first`` tries them one by one."""
    if not is_own(kernel):
        return {"unpack"} if kernel == "unpack" else {"library"}
    variant = Variant.named(kernel)
    found = {variant.kind if variant.grid is None else "integers"}
    if variant.early:
        found.add("early")
    if variant.splits > 1:
        found.add("splits" if variant.kind == "tiled" else "clusters")
    return found


def run_steps(part: str, steps: Sequence[Step], machine: Machine, results: Results) -> int:
    """Each step that was not tried yet. The exit status of the process."""
    for name, step in steps:
        if name in results.part(part):
            continue
        began = time.perf_counter()
        # If the process dies in it, this is what stays.
        results.record(part, name, {FAILED: "it took the process with it, or its time was used up"})
        try:
            found: dict[str, Any] = dict(step())
        except Exception as error:
            # Whole in the log: a compiler's messages, a kernel's name.
            traceback.print_exc()
            found = {FAILED: f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        found["seconds"] = round(time.perf_counter() - began, 2)
        results.record(part, name, found)
        print(f"{part}: {name}: {found.get(FAILED, 'done')} ({found['seconds']} s)", flush=True)
        if FAILED in found and not machine.alive():
            return LOST
    return 0
