"""Packed folders as transformers loads them: modules over packed weights, and their change to a GPU's layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify import lazily

if TYPE_CHECKING:
    from sparsify.backends.packed.loaded.on_gpu import Prepared, prepare

__all__ = ["Prepared", "prepare"]

__getattr__ = lazily(__name__, {"Prepared": "on_gpu", "prepare": "on_gpu"})
