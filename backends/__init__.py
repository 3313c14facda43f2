"""Targets that a pruned program is written for, one folder per target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify import lazily

if TYPE_CHECKING:
    from sparsify.backends.hf.backend import HuggingFace

__all__ = ["HuggingFace"]

__getattr__ = lazily(__name__, {"HuggingFace": "hf.backend"})
