"""An ordinary Hugging Face folder. Nothing heavy is imported before a name is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify import lazily

if TYPE_CHECKING:
    from sparsify.backends.hf.backend import HuggingFace
    from sparsify.backends.hf.job import HuggingFaceJob

__all__ = ["HuggingFace", "HuggingFaceJob"]

__getattr__ = lazily(__name__, {"HuggingFace": "backend", "HuggingFaceJob": "job"})
