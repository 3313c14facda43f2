"""2:4 weights on NVIDIA GPUs: layouts in GPU memory, kernels, and which of them serves how many tokens.

``prepared`` is what a layer holds, ``ops`` what a graph calls, ``products`` runs one kernel; ``dispatch`` and
``autotune`` choose, ``variants`` names the kernels, and ``kernels/*.h`` compute.
"""
