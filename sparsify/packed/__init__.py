"""Packed weights: layouts, the operators that multiply with them, and the kernels behind those.

``layout`` packs one matrix and unpacks it; ``site`` says how a parameter of a model is packed; ``store`` reads a folder
of packed parameters as if it were dense; ``ops`` are the operators of torch, ``native`` their CPU kernels; ``timing``
measures where packing pays.
"""
