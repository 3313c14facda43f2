"""2:4 weights on NVIDIA GPUs: the layouts that lie in GPU memory, the kernels, and which of them serves how many tokens.

``prepared`` is what a layer holds, ``ops`` what a graph calls, ``dispatch`` and ``autotune`` choose, ``variants`` names
the kernels, and ``kernels/*.h`` compute.
"""
