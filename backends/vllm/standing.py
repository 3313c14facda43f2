"""Where a layer stands in a model of vLLM's: some are built under another name (Falcon-H1, the experts of MiniMax-M2),
some under none (MiniCPM3), and some without being asked how they are quantized (a gate of Qwen2-MoE).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase

from sparsify.backends.vllm.experts import SparsifyExpertsMethod
from sparsify.backends.vllm.linear import SparsifyLinearMethod

# Below which name of a mixture vLLM has what holds its stacks.
_HELD = ".routed_experts"


class Standing:
    """Follows the building of a model from :meth:`watch` on, which is given one of its layers, until it is asked.
    Before and after that it can be pickled, as vLLM does with what it hands to the processes that build models.
    """

    def __init__(self) -> None:
        self._above: WeakKeyDictionary[nn.Module, ref[nn.Module]] | None = None
        self._first: ref[nn.Module] | None = None
        self._end: Callable[[], None] | None = None
        self._watched = False

    def watch(self, layer: nn.Module, model_class: type[nn.Module], config: object) -> None:
        """Only the first call counts: what is built later is put below what is built later still.

        Args:
            model_class: of the whole model, which is given ``config`` as its ``quant_config`` where it keeps none
                (Zamba2): vLLM's loader asks that for the names of tensors, and asks nothing where there is none.
        """
        if self._watched:
            return
        self._watched = True
        self._first, above = ref(layer), WeakKeyDictionary[nn.Module, ref[nn.Module]]()

        def put(module: nn.Module, name: str, below: nn.Module | None) -> None:
            if below is not None:
                above[below] = ref(module)
            # Not the model of another engine of this process, after one that failed and left this behind.
            if isinstance(module, model_class) and not hasattr(module, "quant_config") and module in self._upwards():
                module.quant_config = config  # type: ignore[assignment]

        self._above, self._end = above, register_module_module_registration_hook(put).remove

    def model(self) -> nn.Module | None:
        """The whole model, once: ends the watch."""
        if self._end is None:
            return None
        self._end()
        upwards = list(self._upwards())
        self._end = self._above = self._first = None
        return upwards[-1] if upwards else None

    def _upwards(self) -> Iterator[nn.Module]:
        """The first layer, what it is in, what that is in, and so on."""
        module = None if self._first is None else self._first()
        while module is not None and self._above is not None:
            yield module
            above = self._above.get(module)
            module = None if above is None else above()


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every linear layer, and every layer of experts, by the name under which it stands."""
    for name, layer in model.named_modules():
        if isinstance(layer, (LinearBase, RoutedExperts)):
            yield name.removesuffix(_HELD), layer


def name_within(model: nn.Module, name: str) -> str:
    """``name`` of a parameter as the parts of ``model`` rename it that load their own tensors (Gemma 3n's decoder)."""
    for path, part in model.named_modules():
        mapper, prefix = getattr(part, "hf_to_vllm_mapper", None), f"{path}."
        if path and mapper is not None and name.startswith(prefix):
            (below,) = mapper.get_rename_mapper().apply_list([name.removeprefix(prefix)])
            name = prefix + below
    return name


def adopt(layer: Any, method: SparsifyLinearMethod) -> None:
    """Have a layer that was built dense hold what ``method`` awaits."""
    device = layer.weight.device
    del layer.weight
    layer.quant_method = method
    columns = getattr(layer, "input_size_per_partition", layer.input_size)
    rows = list(getattr(layer, "output_partition_sizes", [layer.output_size]))
    with torch.device(device):
        method.create_weights(layer, columns, rows, layer.input_size, layer.output_size, layer.params_dtype)


def adopt_experts(layer: Any, method: SparsifyExpertsMethod) -> None:
    """The same of experts."""
    device = layer.w13_weight.device
    for name, _ in list(layer.named_parameters(recurse=False)):
        if name.startswith(("w13_", "w2_")):
            delattr(layer, name)
    del layer.quant_method  # vLLM's is a module, in the place of which torch takes no other object
    layer.quant_method = method
    inner = layer.intermediate_size_per_partition
    with torch.device(device):
        method.create_weights(layer, layer.local_num_experts, layer.hidden_size, inner, layer.params_dtype)
