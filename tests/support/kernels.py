"""The CPU kernels of each instruction set that the machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sparsify.runtime.cpu import native


def isas() -> tuple[str, ...]:
    kernels = native.library()
    return () if kernels is None else native.ISAS[: kernels.best_isa + 1]


@contextmanager
def running(isa: str, threads: int = 1) -> Iterator[None]:
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_CPU_ISA", isa)
        native.isa.cache_clear()
        torch.set_num_threads(threads)
        try:
            assert native.ISAS[native.isa()] == isa
            yield
        finally:
            torch.set_num_threads(before)
            native.isa.cache_clear()
