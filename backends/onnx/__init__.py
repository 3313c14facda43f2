"""Sparse ONNX. Nothing heavy is imported before a name is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.backends.onnx.api import ExportReport, export_onnx, trace_onnx
    from sparsify.backends.onnx.backend import ONNX

__all__ = ["ONNX", "ExportReport", "export_onnx", "trace_onnx"]


def __getattr__(name: str) -> Any:
    if name == "ONNX":
        from sparsify.backends.onnx.backend import ONNX

        return ONNX
    if name in ("export_onnx", "ExportReport", "trace_onnx"):
        from sparsify.backends.onnx import api

        return getattr(api, name)
    raise AttributeError(name)
