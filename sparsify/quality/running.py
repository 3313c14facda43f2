"""A model with its weights in memory, as it is evaluated whole: on a device, in the dtype that it runs in."""

from __future__ import annotations

import torch
from torch import nn

from sparsify.context import Progress, report
from sparsify.frontend.materialize import materialize
from sparsify.frontend.source import Source
from sparsify.host import within_memory


def running_module(source: Source, device: torch.device) -> nn.Module:
    """A copy of the model of ``source``; one in memory shares what it can, and stays as it is.

    Raises:
        CalibrationError: too little memory. CheckpointError: weights that are broken.
    """
    report(Progress("reading weights", what=source.name))
    with within_memory(f"loading {source.name}", device, "Take a smaller model, or --device cpu"):
        module = materialize(source, source.weights, set(source.weights.parameters()))
        if source.compute is not None:
            unsaved = {id(m._buffers[n]) for m in module.modules() for n in m._non_persistent_buffers_set}
            for tensor in (*module.parameters(), *module.buffers()):
                # What a model keeps in float32 and no file holds (rotary frequencies) it does for a reason.
                if tensor.is_floating_point() and id(tensor) not in unsaved:
                    tensor.data = tensor.data.to(source.compute)
        return module.to(device).eval().requires_grad_(False)
