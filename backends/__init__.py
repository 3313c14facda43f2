"""Targets that a pruned program is written for, one file or folder per target."""

from sparsify.backends.hf import HuggingFace

__all__ = ["HuggingFace"]
