"""How exactly torch multiplies: what decides masks must not hang on settings that a user made for another purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from sparsify.host import alone

_EXACT = ("none", "ieee")
_SHORTER = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32 meanwhile, sums of shorter types in float32, convolutions by one algorithm.

    On a GPU torch's own default for convolutions is TF32, whose numbers have 11 bits, and a user may have asked for it
    in products too; on a CPU for bfloat16. Everything is as it was afterwards.

    One thread at a time, like :func:`sparsify.host.alone`: these settings are the whole process's, and torch's own
    tracing sets them, and turns oneDNN off, and puts back what it found.
    """
    with alone(), _exact_process(), ExitStack() as stack:
        # No autocast of whoever called us: it is the thread's.
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _exact_process() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    asked = _asked_of_products(), _asked_of_convolutions()
    before = [(place, place.fp32_precision) for place in _places()]
    sums = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)) for name in _SHORTER}
    rest = matmul.allow_fp16_accumulation, cudnn.benchmark, cudnn.deterministic
    try:
        # The older of torch's two ways first, which sets both: its kernels refuse to run where the two disagree.
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for place in _places():
            if place.fp32_precision not in _EXACT:
                place.fp32_precision = "ieee"
        for name, (_, split) in sums.items():
            setattr(matmul, name, False if split is None else (False, split))
        matmul.allow_fp16_accumulation, cudnn.benchmark, cudnn.deterministic = False, False, True
        with _only_warned():
            yield
    finally:
        matmul.allow_fp16_accumulation, cudnn.benchmark, cudnn.deterministic = rest
        for name, (allowed, split) in sums.items():
            setattr(matmul, name, allowed if split is None else (allowed, split))
        if asked[0] is not None:
            torch.set_float32_matmul_precision(asked[0])
        if asked[1] is not None:
            cudnn.allow_tf32 = asked[1]
        for place, value in before:
            if place.fp32_precision != value:
                place.fp32_precision = value


@contextmanager
def _only_warned() -> Iterator[None]:
    """Of deterministic algorithms no more than a warning where one is missing: torch would not even select the k-th
    smallest value on a GPU."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if strict:
            torch.use_deterministic_algorithms(True)


def _places() -> list[Any]:
    """Where torch's newer way keeps how float32 is multiplied; oneDNN is the CPU's library."""
    backends: Any = torch.backends
    cpu = backends.mkldnn
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn]


def _asked_of_products() -> str | None:
    """What torch's older way says of products; None where it refuses to, because the newer one was used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _asked_of_convolutions() -> bool | None:
    """The same of convolutions: whether they may be in TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return None
