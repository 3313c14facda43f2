"""2:4 weights on NVIDIA GPUs: the layouts that lie in GPU memory, the kernels, and which of them serves how many
tokens.

``weight`` is what a layer holds, ``ops`` what a graph calls, ``dispatch`` and ``tune`` choose, ``kernels/*.h`` compute.
"""
