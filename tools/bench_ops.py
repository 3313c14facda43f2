"""What the checks of the operators cost a call, beside what the call takes.

    python tools/bench_ops.py [--calls 20000] [--rounds 7]

One thread and its own CPU time, small matrices, so that little but the call itself is measured. Calls with and without
the checks made in Python take turns; of the kernels' own checks: a call that the last of them refuses less one
that the first does. Prints medians over the rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sparsify.host import processor
from sparsify.runtime.codes import row_starts
from sparsify.runtime.cpu import native, products
from sparsify.runtime.layout import pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, torch {torch.__version__}, {native.ISAS[native.isa()]}")
    with torch.inference_mode():
        for rows, columns in ((64, 64), (1024, 64)):
            for layout, call, arguments, unchecked in _calls(rows, columns):
                checked, plain = _in_turns(call, unchecked, arguments, asked.calls, asked.rounds)
                kernel = _native(arguments, asked.calls, asked.rounds)
                print(
                    f"{layout} [{rows}, {columns}], 1 token: {checked:.2f} µs a call, {plain:.2f} without Python's "
                    f"checks (they take {checked - plain:.2f}); the kernel's checks {kernel:.2f}"
                )


def _calls(rows: int, columns: int) -> list[tuple[str, Callable[..., Any], tuple[Any, ...], Callable[..., Any]]]:
    weight = torch.randn(rows, columns).bfloat16()
    weight[:, ::4] = weight[:, 1::4] = 0
    x = torch.randn(1, columns).bfloat16()
    packed, mask = pack(weight, "packed24"), pack(weight, "bitmask")
    starts = row_starts(mask.codes)
    few = products.few_24(), products.FEW_BITMASK
    return [
        (
            "packed24",
            products.linear_24,
            (x, packed.values, packed.codes),
            lambda x, v, c: native.library() and products._linear(x, v, c, None, rows, few[0], None),
        ),
        (
            "bitmask",
            products.linear_bitmask,
            (x, mask.values, mask.codes, starts),
            lambda x, v, c, s: native.library() and products._linear(x, v, c, s, rows, few[1], None),
        ),
    ]


def _in_turns(
    one: Callable[..., Any], other: Callable[..., Any], arguments: tuple[Any, ...], calls: int, rounds: int
) -> tuple[float, float]:
    def once(call: Callable[..., Any]) -> float:
        start = time.thread_time()
        for _ in range(calls):
            call(*arguments)
        return (time.thread_time() - start) / calls * 1e6

    found = [(once(one), once(other)) for _ in range(rounds)]
    return statistics.median(f[0] for f in found), statistics.median(f[1] for f in found)


def _native(arguments: tuple[Any, ...], calls: int, rounds: int) -> float:
    """Of the kernel's own checks."""
    x, values, codes, *starts = arguments
    library = native.library()
    assert library is not None, "there are no kernels to measure"
    rows, width = codes.shape[0], x.shape[-1]
    # Of a bitmask the last check is that of the last start; of packed24 the size of x.
    beyond = starts[0].clone() if starts else None
    if beyond is not None:
        beyond[-2] = 1 << 40
    y = x.new_empty(1, rows)

    def call(isa: int) -> int:
        answer: int = library.linear(
            isa,
            native.KINDS[x.dtype],
            values.data_ptr(),
            values.numel(),
            codes.data_ptr(),
            codes.nbytes,
            0 if beyond is None else beyond.data_ptr(),
            0 if beyond is None else beyond.numel(),
            x.data_ptr(),
            x.numel() - (beyond is None),
            0,
            -1,
            y.data_ptr(),
            rows,
            width,
            16,
            1,
        )
        return answer

    assert call(-1) and call(native.isa())
    last, first = _in_turns(call, lambda isa: call(-1), (native.isa(),), calls, rounds)
    return last - first


if __name__ == "__main__":
    main()
