"""The backend ``packed``. Imports nothing heavy: its words are refused before a model is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify.runtime.words import AskedLayout, PackingChoice

if TYPE_CHECKING:
    from sparsify.backends.packed.job import PackedJob
    from sparsify.frontend.source import Source
    from sparsify.ir.program import Program


@dataclass(frozen=True)
class PackedBackend:
    """The backend ``packed``: a Hugging Face folder whose pruned weights are stored, loaded and run packed.

    Attributes:
        layout: ``auto`` takes packed24 where a weight is 2:4 along its inputs and a bitmask elsewhere.
        choice: ``measured`` leaves a weight dense where one token through it is measured to take longer packed;
            ``smallest`` packs whatever becomes smaller.
    """

    layout: AskedLayout = "auto"
    choice: PackingChoice = "measured"

    name: ClassVar[str] = "packed"
    needs_pass: ClassVar[bool] = False

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> PackedJob:
        from sparsify.backends.packed.job import PackedJob

        return PackedJob(source, out, overwrite=overwrite, layout=self.layout, choice=self.choice)
