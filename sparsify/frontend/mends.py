"""Faults of transformers that keep a whole architecture from running, put right for the time of a trace.

Each says what fails, in which version it was seen, and does nothing where it is mended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def mended(module: nn.Module) -> Iterator[None]:
    """``module``'s class as it runs."""
    if type(module).__name__ != "Llama4ForConditionalGeneration":
        yield
        return
    # 5.24: its forward copies ``image_outputs`` from the output of its language model, which has no such field, so that
    # it fails whatever it is given. Nothing is what a text without images has there.
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    output: Any = MoeCausalLMOutputWithPast
    if hasattr(output, "image_outputs"):
        yield
        return
    output.image_outputs = None
    try:
        yield
    finally:
        del output.image_outputs
