"""What vLLM asks of a quantization config, answered for packed folders."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from sparsify.backends.packed.config import METHOD, check_activations, check_gpu, sites_of
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.vllm.experts import SparsifyExpertsMethod
from sparsify.backends.vllm.linear import SparsifyHeadMethod, SparsifyLinearMethod
from sparsify.backends.vllm.matrices import Awaited
from sparsify.backends.vllm.names import CheckpointNames
from sparsify.errors import CheckpointError


class SparsifyConfig(QuantizationConfig):
    """``quantization_config`` of a packed folder.

    Attributes:
        sites: packed parameters, by what vLLM's modules are called. how: as :class:`OnDevice` takes it.
    """

    def __init__(self, sites: dict[str, PackedSite], how: dict[str, Any]) -> None:
        super().__init__()
        self.sites, self.how = sites, how
        self._hf_config: Any = None
        self._names: CheckpointNames | None = None
        self._taken: set[str] = set()

    @classmethod
    def get_name(cls) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparsifyConfig:
        """Raises:
        CheckpointError: a newer format, or entries that are damaged.
        """
        sites = sites_of({"quantization_config": config}, "(config.json)") or {}
        gpu, activations = config.get("gpu", {}), config.get("activations", "int8")
        check_gpu(config.get("siblings", []), gpu, sites)
        check_activations(activations)
        return cls(sites, {"exact": activations == "float", **gpu})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self._hf_config = hf_config

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self._rename()
        self.sites = hf_to_vllm_mapper.apply_dict(self.sites)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Names of tensors as checkpoints have them, which vLLM's own mapping then reads.

        Raises:
            CheckpointError: a packed parameter that no layer of the model has asked for.
        """
        self._rename()
        self._check_taken()
        names = self._names
        own = WeightsMapper(orig_to_new_renaming=[names] if names else [])  # type: ignore[list-item]
        return own | QuantizationConfig.get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._rename()
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        awaited = self._awaited(prefix)
        if all(each.site is None for each in awaited):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        kind = SparsifyLinearMethod if isinstance(layer, LinearBase) else SparsifyHeadMethod
        return kind(awaited, **self.how)

    def _awaited(self, prefix: str) -> list[Awaited]:
        """The matrices that the layer ``prefix`` is made of."""
        above, _, leaf = prefix.rpartition(".")
        members = [leaf] if f"{prefix}.weight" in self.sites else self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{above}.{member}.weight" if above else f"{member}.weight" for member in members]
        return [Awaited(name, self._take(name)) for name in names]

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        gates = [f"{prefix}.{name}" for name in ("gate_up_proj", "w13")]
        downs = [f"{prefix}.{name}" for name in ("down_proj", "w2")]
        stacks = [
            Awaited(next((name for name in names if name in self.sites), names[0]), None) for names in (gates, downs)
        ]
        for stack in stacks:
            stack.site = self._take(stack.name)
        if all(stack.site is None for stack in stacks):
            return None
        return SparsifyExpertsMethod(layer.moe_config, *stacks, **self.how)

    def _take(self, name: str) -> PackedSite | None:
        if name in self.sites:
            self._taken.add(name)
        return self.sites.get(name)

    def _rename(self) -> None:
        """Call sites what checkpoints call them, once; vLLM's transformers backend has transformers' own names."""
        if self._names is not None or self._hf_config is None:
            return
        if _transformers_backend():
            self._hf_config = None
            return
        self._names = CheckpointNames(self._hf_config)
        self.sites = {self._names.rename_source_key(name)[0]: site for name, site in self.sites.items()}

    def _check_taken(self) -> None:
        from vllm.config import get_current_vllm_config

        lost = sorted(set(self.sites) - self._taken)
        if lost and get_current_vllm_config().parallel_config.pipeline_parallel_size == 1:
            raise CheckpointError(
                f"packed parameter {lost[0]}",
                found=f"no layer of vLLM's model reads it ({len(lost)} of {len(self.sites)} are not read)",
                do="vLLM has other layers there: serve the folder with `sparsify serve`, or with --model-impl "
                "transformers",
            )


def _transformers_backend() -> bool:
    from vllm.config import get_current_vllm_config

    return bool(get_current_vllm_config().model_config.using_transformers_backend())
