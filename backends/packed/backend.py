"""The backend ``packed``. Imports nothing heavy; see :mod:`sparsify.backends.packed.options`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify.backends.packed.options import Options
from sparsify.errors import SpecError

if TYPE_CHECKING:
    from sparsify.backends.packed.job import PackedJob
    from sparsify.frontend.source import Source
    from sparsify.ir.program import Program
    from sparsify.method.base import Pass


@dataclass(frozen=True)
class PackedBackend(Options):
    """The backend ``packed``: a Hugging Face folder whose pruned weights are stored, loaded and run packed."""

    name: ClassVar[str] = "packed"
    needs_pass: ClassVar[bool] = False

    def check(self, passes: Sequence[Pass]) -> None:
        """Refuse to round by zero points what is then rounded again, to integers about zero.

        Raises:
            SpecError: a pass leaves a grid that ``values=`` does not hold.
        """
        most = {"int8": 4, "int4": 3}.get(self.values)
        given = next((p for p in passes if most is not None and (p.zero_points or 0) > most), None)
        if given is None:
            return
        kept = "Leave values out (4 bits with zero points are stored to the bit, as 8 bits)"
        raise SpecError(
            f"{given.name} with symmetric=false and --to packed:values={self.values}",
            found=f"{given.zero_points} bits with zero points, which {self.values} about zero does not hold: weights "
            "would be rounded twice",
            do=f"Leave symmetric=false out, or write --to hf{'. ' + kept if given.zero_points == 4 else ''}",
        )

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> PackedJob:
        from sparsify.backends.packed.job import PackedJob

        return PackedJob(source, out, overwrite=overwrite, options=self)
