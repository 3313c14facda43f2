"""What vLLM asks of a quantization config, answered for packed folders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from sparsify.backends.packed.config import METHOD, check_activations, check_gpu, sites_of
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.vllm.experts import SparsifyExpertsMethod
from sparsify.backends.vllm.linear import SparsifyHeadMethod, SparsifyLinearMethod
from sparsify.backends.vllm.matrices import Awaited, Site
from sparsify.backends.vllm.names import CheckpointNames
from sparsify.backends.vllm.orphans import Orphan, Orphans
from sparsify.errors import CheckpointError


class SparsifyConfig(QuantizationConfig):
    """``quantization_config`` of a packed folder, or of a checkpoint of compressed-tensors without its zeros.

    Attributes:
        sites: packed parameters, by what vLLM's modules are called. how: as :class:`OnDevice` takes it.
    """

    def __init__(self, sites: dict[str, PackedSite], how: dict[str, Any], orphans: Orphans | None = None) -> None:
        super().__init__()
        self.sites, self.how, self.orphans = sites, how, orphans
        self._hf_config: Any = None
        self._names: CheckpointNames | None = None
        self._renamed, self._whole = False, False
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
        if (orphans := Orphans.of(config)) is not None:
            return cls({}, {}, orphans)
        sites = sites_of({"quantization_config": config}, "(config.json)") or {}
        gpu, activations = config.get("gpu", {}), config.get("activations", "int8")
        check_gpu(config.get("siblings", []), gpu, sites)
        check_activations(activations)
        return cls(sites, {"exact": activations == "float", **gpu})

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        return METHOD if Orphans.of(hf_quant_cfg) is not None else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self._hf_config = hf_config

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self._rename()
        self.sites = hf_to_vllm_mapper.apply_dict(self.sites)
        if self.orphans is not None:
            ignore = tuple(hf_to_vllm_mapper.apply_list(list(self.orphans.ignore)))
            self.orphans = replace(self.orphans, ignore=ignore)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Names of tensors as checkpoints have them, which vLLM's own mapping then reads.

        Raises:
            CheckpointError: a packed parameter that no layer of the model has asked for.
        """
        self._rename()
        self._check_taken()
        names = self._names
        own = WeightsMapper(orig_to_new_renaming=[names] if names else [])
        return own | QuantizationConfig.get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._rename()
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        head = isinstance(layer, ParallelLMHead)
        awaited = self._awaited(prefix, head)
        if awaited is None:
            return None if head else UnquantizedLinearMethod()
        return (SparsifyHeadMethod if head else SparsifyLinearMethod)(awaited, **self.how)

    def _awaited(self, prefix: str, head: bool) -> list[Awaited] | None:
        """The matrices that the layer ``prefix`` is made of; None where all of them are dense."""
        above, _, leaf = prefix.rpartition(".")
        members = [leaf] if f"{prefix}.weight" in self.sites else self.packed_modules_mapping.get(leaf, [leaf])
        modules = [f"{above}.{member}" if above else member for member in members]
        if self.orphans is not None:
            tied = head and getattr(self._hf_config, "tie_word_embeddings", False)
            if tied or all(self.orphans.ignored(module) for module in modules):
                return None
            return [Orphan(module, self.orphans.form) for module in modules]
        sites = [Site(f"{module}.weight", self._take(f"{module}.weight")) for module in modules]
        return None if all(each.site is None for each in sites) else [*sites]

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        gates = [f"{prefix}.{name}" for name in ("gate_up_proj", "w13")]
        downs = [f"{prefix}.{name}" for name in ("down_proj", "w2")]
        stacks = [
            Site(next((name for name in names if name in self.sites), names[0]), None) for names in (gates, downs)
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
        if self._renamed or self._hf_config is None or self.orphans is not None:
            return
        self._renamed, running = True, get_current_vllm_config()
        self._whole = running.parallel_config.pipeline_parallel_size == 1
        if running.model_config.using_transformers_backend():
            return
        self._names = CheckpointNames(self._hf_config)
        self.sites = {self._names.rename_source_key(name)[0]: site for name, site in self.sites.items()}

    def _check_taken(self) -> None:
        lost = sorted(set(self.sites) - self._taken)
        # A rank of a pipeline has a part of the layers.
        if lost and self._whole:
            raise CheckpointError(
                f"packed parameter {lost[0]}",
                found=f"no layer of vLLM's model reads it ({len(lost)} of {len(self.sites)} are not read)",
                do="Serve the folder with `sparsify serve`, or with --model-impl transformers",
            )
