"""The backend ``cuda``. Imports nothing heavy: its words are refused before a model is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify.runtime.words import Policy, check_policy

if TYPE_CHECKING:
    from sparsify.backends.cuda.job import CudaJob
    from sparsify.frontend.source import Source
    from sparsify.ir.program import Program


@dataclass(frozen=True)
class CudaBackend:
    """The backend ``cuda``: a packed folder whose 2:4 weights a GPU runs on its sparse tensor cores.

    Attributes:
        policy: which copies of a weight lie in GPU memory. ``decode``: one for few tokens (0.56 of the dense bytes),
            which serves many through a dense copy of one layer at a time; ``prefill``: one for many (0.56); ``both``:
            two (1.13).
        tune: measure the kernels, once per shape and GPU: here where a GPU is, and wherever the folder is loaded on
            one; else built-in defaults choose.
    """

    policy: Policy = "decode"
    tune: bool = True

    name: ClassVar[str] = "cuda"
    needs_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_policy(self.policy, f"--to cuda:policy={self.policy}")

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> CudaJob:
        from sparsify.backends.cuda.job import CudaJob

        return CudaJob(source, out, overwrite=overwrite, policy=self.policy, tune=self.tune)
