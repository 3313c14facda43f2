"""Sparse ONNX. Nothing heavy is imported before a name is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify import lazily

if TYPE_CHECKING:
    from sparsify.backends.onnx.api import ExportReport, export_onnx, trace_onnx
    from sparsify.backends.onnx.backend import ONNX

__all__ = ["ONNX", "ExportReport", "export_onnx", "trace_onnx"]

__getattr__ = lazily(__name__, {"ExportReport": "api", "ONNX": "backend", "export_onnx": "api", "trace_onnx": "api"})
