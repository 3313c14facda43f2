"""Every kernel on the products of LLaMA-7B and Llama-3-8B, against cuBLAS of the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from sparsify.runtime.cuda.integers import IntegerGrid


def steps(machine: Machine, results: Results) -> list[Step]:
    broken = broken_families(results)
    layers = machine.sizes.shapes
    shapes = {(rows, columns) for model in layers.values() for _, rows, columns in model}
    # Those of the model that `decode` runs, then the rest; the largest first: a model's time goes into them.
    own = {(rows, columns) for _, rows, columns in next(iter(layers.values()))}
    ordered = sorted(shapes, key=lambda shape: (shape not in own, -shape[0] * shape[1]))
    return [
        *(
            (f"{rows}x{columns}, {tokens} tokens", partial(time_shape, machine, rows, columns, [tokens], broken))
            for rows, columns in ordered
            for tokens in machine.sizes.tokens
        ),
        *(
            (f"{rows}x{columns} {grid.kind}", partial(time_integers, machine, rows, columns, grid, broken))
            for rows, columns in ordered
            for grid in TIMED
        ),
    ]


def time_shape(machine: Machine, rows: int, columns: int, counts: Sequence[int], broken: set[str]) -> Found:
    """Microseconds by number of tokens and kernel, ``dense`` (cuBLAS) among them; kept for `decode` to prepare with."""
    dtype, library = torch.bfloat16, machine.gpu.library
    if library is not None and ("library" in broken or libraries.unfit(library, rows, columns) is not None):
        library = None
    timings = race(
        rows, columns, dtype, "both", library, machine.device, machine.clock, machine.gpu, counts,
        partial(sound_call, broken),
    )  # fmt: skip
    few = {
        tokens: {name: time for name, time in times.items() if not name.startswith(("cusparselt", "cutlass"))}
        for tokens, times in timings.micro.items()
    }
    store, key = TimesFile.of(machine.device), key_of(rows, columns)
    before = store.get(key)
    known = dict(before.micro) if before is not None else {}
    store.put(key, Timings(known | {tokens: times for tokens, times in few.items() if len(times) > 1}))
    if not machine.emulated:
        torch.cuda.empty_cache()
    for t in timings.micro:
        best = f"{timings.gain(t):.2f}× {timings.best(t)[0]}, dense {timings.micro[t][DENSE]:.1f} µs"
        print(f"{rows}×{columns}, {t} tokens: {best}", flush=True)
    return {"micro": {str(tokens): dict(times) for tokens, times in timings.micro.items()}}


# An integer of 8 bits has one scale a row, as a rule, and one of 4 bits one for 64 columns.
TIMED = (IntegerGrid(8, None), IntegerGrid(4, 64))


def time_integers(machine: Machine, rows: int, columns: int, grid: IntegerGrid, broken: set[str]) -> Found:
    """The same of integers, for few tokens and for the first number of them that is unpacked for."""
    timings = race(
        rows, columns, torch.bfloat16, "decode", None, machine.device, machine.clock, machine.gpu,
        [t for t in machine.sizes.tokens if t <= 64], partial(sound_call, broken), grid,
    )  # fmt: skip
    if not machine.emulated:
        torch.cuda.empty_cache()
    return {"integers": {str(tokens): dict(times) for tokens, times in timings.micro.items()}}


def key_of(rows: int, columns: int) -> str:
    """Under which the times of the policy ``decode`` are kept."""
    return f"{rows}x{columns}:bfloat16:decode:none"


def sound_call(broken: set[str], kernel: str, matrix: RacedMatrix) -> Callable[[Tensor], Tensor]:
    """:func:`call_of`, but for kernels of the families that part ``first`` found broken."""
    found = broken & families_of(kernel)

    def refuse(x: Tensor) -> Tensor:
        raise RuntimeError(f"part `first` found {', '.join(sorted(found))} broken")

    return refuse if found else call_of(kernel, matrix)
