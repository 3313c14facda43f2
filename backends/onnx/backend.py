"""The backend ``onnx``. Imports nothing heavy; see :mod:`sparsify.backends.onnx.options`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify.backends.onnx.options import Options

if TYPE_CHECKING:
    from sparsify.backends.onnx.job import ONNXJob
    from sparsify.frontend.source import Source
    from sparsify.ir.program import Program


@dataclass(frozen=True)
class ONNX(Options):
    """The backend ``onnx``: a folder that transformers, onnxruntime, optimum and onnxruntime-genai all load."""

    name: ClassVar[str] = "onnx"
    needs_pass: ClassVar[bool] = False

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> ONNXJob:
        from sparsify.backends.onnx.job import ONNXJob

        return ONNXJob(self, source, out, overwrite=overwrite, program=program)
