"""2:4 models on NVIDIA GPUs: what ``--to cuda`` writes.

The kernels, layouts and tables are :mod:`sparsify.runtime.cuda`; the folder and its modules are those of the backend
``packed``, and :func:`sparsify.backends.packed.loaded.prepare` takes a loaded model to its GPU's layouts.
"""
