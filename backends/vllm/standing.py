"""Where a layer stands in a model of vLLM's: some are built under another name (Falcon-H1), some under none (MiniCPM3),
and some without being asked how they are quantized (a gate of Qwen2-MoE).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.linear import LinearBase

from sparsify.backends.vllm.linear import SparsifyLinearMethod


class Standing:
    """Follows the building of a model from :meth:`watch` on, which is given one of its layers, until it is asked.
    Before and after that it can be pickled, as vLLM does with what it hands to the processes that build models.
    """

    def __init__(self) -> None:
        self._above: WeakKeyDictionary[nn.Module, ref[nn.Module]] | None = None
        self._first: ref[nn.Module] | None = None
        self._end: Callable[[], None] | None = None
        self._watched = False

    def watch(self, layer: nn.Module) -> None:
        """Only the first call counts: what is built later is put below what is built later still."""
        if self._watched:
            return
        self._watched = True
        self._first, above = ref(layer), WeakKeyDictionary[nn.Module, ref[nn.Module]]()

        def put(module: nn.Module, name: str, below: nn.Module | None) -> None:
            if below is not None:
                above[below] = ref(module)

        self._above, self._end = above, register_module_module_registration_hook(put).remove

    def linear_layers(self) -> Iterator[tuple[str, Any]]:
        """Every linear layer of the model by the name under which it stands. Ends the watch."""
        if self._end is None or self._above is None or self._first is None:
            return
        self._end()
        top = self._first()
        while top is not None and (above := self._above.get(top)) is not None:
            top = above()
        self._end = self._above = self._first = None
        if top is not None:
            yield from ((name, layer) for name, layer in top.named_modules() if isinstance(layer, LinearBase))


def adopt(layer: Any, method: SparsifyLinearMethod) -> None:
    """Have a layer that was built dense hold what ``method`` awaits."""
    device = layer.weight.device
    del layer.weight
    layer.quant_method = method
    columns = getattr(layer, "input_size_per_partition", layer.input_size)
    rows = list(getattr(layer, "output_partition_sizes", [layer.output_size]))
    with torch.device(device):
        method.create_weights(layer, columns, rows, layer.input_size, layer.output_size, layer.params_dtype)
