"""The backend ``packed``. Imports nothing heavy; see :mod:`sparsify.backends.packed.options`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify.backends.packed.options import Options

if TYPE_CHECKING:
    from sparsify.backends.packed.job import PackedJob
    from sparsify.frontend.source import Source
    from sparsify.ir.program import Program


@dataclass(frozen=True)
class PackedBackend(Options):
    """The backend ``packed``: a Hugging Face folder whose pruned weights are stored, loaded and run packed."""

    name: ClassVar[str] = "packed"
    needs_pass: ClassVar[bool] = False

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> PackedJob:
        from sparsify.backends.packed.job import PackedJob

        return PackedJob(source, out, overwrite=overwrite, options=self)
