"""2:4 models on NVIDIA GPUs: what ``--to cuda`` writes, and how a loaded packed model takes its GPU's layouts.

The kernels, layouts and tables are :mod:`sparsify.cuda`; the folder and its modules are those of the backend
``packed``.
"""

from sparsify.backends.cuda.prepare import Prepared, prepare

__all__ = ["Prepared", "prepare"]
