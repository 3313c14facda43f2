"""Pruning methods, one per file; each is mathematics only and knows no graph, file or device.

What several share is in ``solvers``: ``fitting`` (the problem of moving kept weights), ``scored`` (scores with an
optional update) and their numerics. ``lowering`` prunes nothing: it rewrites graphs whose weights were pruned.
Importing one method imports none of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify import lazily

if TYPE_CHECKING:
    from sparsify.passes.activation import Activation
    from sparsify.passes.alps import ALPS
    from sparsify.passes.apt import APT
    from sparsify.passes.gblm import GBLM
    from sparsify.passes.gradient import Gradient
    from sparsify.passes.llm_pruner import LLMPruner
    from sparsify.passes.lowering.lower_sparse import LowerSparse
    from sparsify.passes.magnitude import Magnitude
    from sparsify.passes.permute import Permute
    from sparsify.passes.refine import Refine
    from sparsify.passes.round import Round
    from sparsify.passes.sparsegpt import SparseGPT
    from sparsify.passes.twin import Twin
    from sparsify.passes.wanda import Wanda

__all__ = [
    "ALPS", "APT", "GBLM", "Activation", "Gradient", "LLMPruner", "LowerSparse", "Magnitude", "Permute", "Refine",
    "Round", "SparseGPT", "Twin", "Wanda",
]  # fmt: skip

__getattr__ = lazily(
    __name__,
    {
        "ALPS": "alps",
        "APT": "apt",
        "Activation": "activation",
        "GBLM": "gblm",
        "Gradient": "gradient",
        "LLMPruner": "llm_pruner",
        "LowerSparse": "lowering.lower_sparse",
        "Magnitude": "magnitude",
        "Permute": "permute",
        "Refine": "refine",
        "Round": "round",
        "SparseGPT": "sparsegpt",
        "Twin": "twin",
        "Wanda": "wanda",
    },
)
