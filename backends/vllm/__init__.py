"""Packed folders in vLLM: a plug-in that its entry point ``vllm.general_plugins`` finds.

vLLM itself is no dependency of ours: it is imported here, in the process that asked for plug-ins, or not at all.
"""

from __future__ import annotations


def register() -> None:
    """Make ``quant_method: sparsify`` known to vLLM, in every process of its own; again does nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from sparsify.backends.packed.config import METHOD

    if METHOD not in QUANTIZATION_METHODS:
        from sparsify.backends.vllm.config import SparsifyConfig

        register_quantization_config(METHOD)(SparsifyConfig)
