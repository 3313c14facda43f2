"""Pruning methods, one per file; each is mathematics only and knows no graph, file or device.

What several share is in ``gram`` (damped Gram matrix and factor), ``sweep`` (column by column), ``exact`` (all at
once), ``fitting`` (the problem that those solve) and ``scored`` (scores with an optional update). ``lower_sparse``
prunes nothing: it rewrites a graph whose weights were pruned. ``llm_pruner`` removes whole channels.
"""

from sparsify.passes.activation import Activation
from sparsify.passes.alps import ALPS
from sparsify.passes.apt import APT
from sparsify.passes.gblm import GBLM
from sparsify.passes.gradient import Gradient
from sparsify.passes.llm_pruner import LLMPruner
from sparsify.passes.lower_sparse import LowerSparse
from sparsify.passes.magnitude import Magnitude
from sparsify.passes.sparsegpt import SparseGPT
from sparsify.passes.twin import Twin
from sparsify.passes.wanda import Wanda

__all__ = [
    "ALPS", "APT", "GBLM", "Activation", "Gradient", "LLMPruner", "LowerSparse", "Magnitude", "SparseGPT", "Twin",
    "Wanda",
]  # fmt: skip
