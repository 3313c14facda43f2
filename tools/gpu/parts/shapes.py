"""Every kernel on the products of LLaMA-7B and Llama-3-8B, against cuBLAS of the same run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from machine import Found, Machine, Step, families_of
from results import Results
from torch import Tensor

from parts.checks import broken_families
from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda.autotune.measure import RacedMatrix
from sparsify.runtime.cuda.autotune.times import TimesFile, call_of, race
from sparsify.runtime.cuda.dispatch import DENSE, Timings


def steps(machine: Machine, results: Results) -> list[Step]:
    broken = broken_families(results)
    shapes = {(rows, columns) for layers in machine.sizes.shapes.values() for _, rows, columns in layers}
    # The largest first: they are what a model's time goes into.
    ordered = sorted(shapes, key=lambda shape: -shape[0] * shape[1])
    return [(f"{rows}x{columns}", partial(time_shape, machine, rows, columns, broken)) for rows, columns in ordered]


def time_shape(machine: Machine, rows: int, columns: int, broken: set[str]) -> Found:
    """Microseconds by number of tokens and kernel, ``dense`` (cuBLAS) among them."""
    dtype, library = torch.bfloat16, machine.gpu.library
    if library is not None and ("library" in broken or libraries.unfit(library, rows, columns) is not None):
        library = None
    timings = race(
        rows, columns, dtype, "both", library, machine.device, machine.clock, machine.gpu, machine.sizes.tokens,
        partial(sound_call, broken),
    )  # fmt: skip
    # What `decode` prepares a model with, so that it has not to be measured again.
    few = {tokens: {k: t for k, t in times.items() if not k.startswith(("cusparselt", "cutlass"))}
           for tokens, times in timings.micro.items()}  # fmt: skip
    TimesFile.of(machine.device).put(f"{rows}x{columns}:bfloat16:decode:none", Timings(few))
    if not machine.emulated:
        torch.cuda.empty_cache()
    lines = [f"{t} tokens: {timings.gain(t):.2f}× {timings.best(t)[0]}, dense {timings.micro[t][DENSE]:.1f} µs"
             for t in timings.micro]  # fmt: skip
    print(f"{rows}×{columns}: " + "; ".join(lines), flush=True)
    return {"micro": {str(tokens): dict(times) for tokens, times in timings.micro.items()}}


def sound_call(broken: set[str], kernel: str, matrix: RacedMatrix) -> Callable[[Tensor], Tensor]:
    """:func:`call_of`, but for kernels of the families that part ``first`` found broken."""
    found = broken & families_of(kernel)

    def refuse(x: Tensor) -> Tensor:
        raise RuntimeError(f"part `first` found {', '.join(sorted(found))} broken")

    return refuse if found else call_of(kernel, matrix)
