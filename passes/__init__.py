"""Pruning methods, one per file; each is mathematics only and knows no graph, file or device."""

from sparsify.passes.magnitude import Magnitude
from sparsify.passes.wanda import Wanda

__all__ = ["Magnitude", "Wanda"]
