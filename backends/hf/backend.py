"""The backend ``hf``. Imports nothing heavy: its words are refused before a model is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from sparsify.backends.hf.job import HuggingFaceJob
    from sparsify.frontend.source import Source
    from sparsify.ir.program import Program


@dataclass(frozen=True)
class HuggingFace:
    """The backend ``hf``: an ordinary checkpoint."""

    name: ClassVar[str] = "hf"
    needs_pass: ClassVar[bool] = True

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> HuggingFaceJob:
        from sparsify.backends.hf.job import HuggingFaceJob

        return HuggingFaceJob(source, out, overwrite=overwrite)
