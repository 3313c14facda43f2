"""What vLLM asks of a quantization config, answered for packed folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from sparsify.backends.packed.config import METHOD, check_activations, check_cpu, check_gpu, sites_of
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.store import PackedStore
from sparsify.backends.vllm.asked import asked_policy
from sparsify.backends.vllm.beside import Copies
from sparsify.backends.vllm.experts import SparsifyExpertsMethod
from sparsify.backends.vllm.linear import SparsifyHeadMethod, SparsifyLinearMethod
from sparsify.backends.vllm.matrices import PARTS, Awaited, Site
from sparsify.backends.vllm.names import CheckpointNames, WholeStacks
from sparsify.backends.vllm.orphan_stacks import OrphanStack
from sparsify.backends.vllm.orphans import BESIDE, Orphans, is_left_over
from sparsify.backends.vllm.stacks import Stack
from sparsify.backends.vllm.standing import Standing, adopt, adopt_experts, layers_of, name_within
from sparsify.errors import BackendError, CheckpointError
from sparsify.files.checkpoint import INDEX, WEIGHTS, Checkpoint
from sparsify.files.ledger import Ledger

logger = init_logger(__name__)
# Queries, keys and values head by head (Bloom, Falcon), which vLLM wants one below the other: it moves their rows.
_REORDERED = ("query_key_value",)
# Queries and keys that a model turns for its rotary embedding, of tensors called ``weight`` alone (Llama 4), and whose.
_TURNS = "def permute_qk_weight_for_rotary"
_TURNED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
# What a model calls that makes the names of single experts for a loop of its own.
_ONE_BY_ONE = "make_expert_params_mapping"
# What it says where that loop looks for dense stacks as well (Llama 4, GraniteMoeHybrid).
_OWN_STACKS = ('"experts.gate_up_proj" in', 'endswith(".block_sparse_moe.input_linear.weight")')


class SparsifyConfig(QuantizationConfig):
    """``quantization_config`` of a packed folder, or of a checkpoint of compressed-tensors without its zeros.

    Attributes:
        sites: packed parameters, by what vLLM's modules are called. how: as :class:`OnDevice` takes it.
        cpu: what the folder says of CPUs.
    """

    def __init__(
        self,
        sites: dict[str, PackedSite],
        how: dict[str, Any],
        orphans: Orphans | None = None,
        cpu: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.sites, self.how, self.orphans, self.cpu = sites, how, orphans, cpu or {}
        self._hf_config: Any = None
        self._names: CheckpointNames | None = None
        self._renamed, self._settled, self._checked = False, False, False
        self._taken: set[str] = set()
        self._fused: dict[str, list[str]] = {}
        self._endings: dict[str, str | None] = {}
        self._source, self._alone, self._standing = "", False, Standing()

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
        gpu, cpu, activations = config.get("gpu", {}), config.get("cpu", {}), config.get("activations", "int8")
        check_gpu(config.get("siblings", []), gpu, sites)
        check_cpu(cpu)
        check_activations(activations)
        return cls(sites, {"exact": activations == "float", **gpu}, cpu=cpu)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        for own in (hf_quant_cfg, getattr(hf_config, "quantization_config", None)):
            if isinstance(own, dict) and is_left_over(own):
                # What vLLM reads itself but for this entry.
                del own["sparsity_config"]
        return METHOD if Orphans.of(hf_quant_cfg) is not None else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raises:
        CheckpointError: files that are cut off, or that do not hold what config.json and sparsify.json say.
        """
        self._hf_config = hf_config
        _check_headers(Path(model_name), self.sites)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self._rename()
        self.sites = hf_to_vllm_mapper.apply_dict(self.sites)
        if self.orphans is not None:
            dense, whole = (
                tuple(hf_to_vllm_mapper.apply_list(list(names))) for names in (self.orphans.dense, self.orphans.whole)
            )
            self.orphans = replace(self.orphans, dense=dense, whole=whole)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Names of tensors as checkpoints have them, which vLLM's own mapping then reads.

        Raises:
            CheckpointError: a packed parameter that no layer of the model has asked for.
        """
        self._rename()
        self._check_taken()
        names = self._names
        endings = dict.fromkeys(BESIDE) if self.orphans is not None else self._endings
        renaming = [*([names] if names else []), *([WholeStacks()] if self._alone else [])]
        own = WeightsMapper(orig_to_new_renaming=renaming, orig_to_new_suffix=endings)
        return own | QuantizationConfig.get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Raises:
        SpecError: what was asked of us beside the folder cannot be meant.
        """
        self._rename()
        self._settle(layer)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        head = isinstance(layer, ParallelLMHead)
        # Some models (StableLM) put a point before the name of a module that nothing stands above.
        awaited = self._awaited(prefix.lstrip("."), head)
        if awaited is None:
            return None if head else UnquantizedLinearMethod()
        return (SparsifyHeadMethod if head else SparsifyLinearMethod)(awaited, **self.how)

    def _awaited(self, prefix: str, head: bool) -> list[Awaited] | None:
        """The matrices that the layer ``prefix`` is made of; None where all of them are dense.

        Raises:
            BackendError: one that vLLM brings into another order, of which that layout has none.
        """
        above, _, leaf = prefix.rpartition(".")
        members = [leaf]
        if f"{prefix}.weight" not in self.sites:
            members = self.packed_modules_mapping.get(leaf) or self._fused.get(leaf, members)
        modules = [f"{above}.{member}" if above else member for member in members]
        if self.orphans is not None:
            tied = head and getattr(self._hf_config, "tie_word_embeddings", False)
            if tied or all(self.orphans.ignored(module) for module in modules):
                return None
            return [self.orphans.orphan(module) for module in modules]
        sites = [Site(f"{module}.weight", self._take(f"{module}.weight")) for module in modules]
        for each in sites:
            if each.site is None or self._names is None:
                continue
            heads = _TURNED.get(each.name.split(".")[-2]) if _TURNS in self._source else None
            each.turned = getattr(self._hf_config.get_text_config(), heads) if heads else 0
            if each.site.layout == "bitmask" and (each.turned or leaf in _REORDERED):
                raise BackendError(
                    f"packed parameter {each.name}",
                    found="a bitmask, which has no rows that vLLM could bring into the order in which it wants them",
                    do="Prune it 2:4 or keep it dense (--ignore) and pack again, or serve it with `sparsify serve`",
                )
        return None if all(each.site is None for each in sites) else [*sites]

    def _experts(self, layer: RoutedExperts, prefix: str) -> SparsifyExpertsMethod | None:
        if self.orphans is not None:
            orphans = [OrphanStack(f"{prefix}.{name}", prefix, self.orphans) for name in ("w13", "w2")]
            modules = [module for stack in orphans for module in stack.modules(layer, 0).values()]
            if all(self.orphans.ignored(module) for module in modules):
                return None
            return SparsifyExpertsMethod(layer.moe_config, *orphans, **self.how)
        gates = [f"{prefix}.{name}" for name in ("gate_up_proj", "w13")]
        downs = [f"{prefix}.{name}" for name in ("down_proj", "w2")]
        stacks = [
            Stack(next((name for name in names if name in self.sites), names[0]), None) for names in (gates, downs)
        ]
        for stack in stacks:
            stack.site = self._take(stack.name)
        if all(stack.site is None for stack in stacks) and not self._alone:
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
        if running.model_config.using_transformers_backend():
            return
        self._source = _source_of(self._hf_config)
        own = any(words in self._source for words in _OWN_STACKS)
        loop, packed = own or _ONE_BY_ONE in self._source, any(site.experts for site in self.sites.values())
        # Of such a model every stack comes whole where one is packed; dense ones alone go its own way, if it has one.
        self._alone = loop and (packed or not own)
        self._names = CheckpointNames(self._hf_config, stacks=self._alone or not own)
        self.sites = {self._names.rename_source_key(name)[0]: site for name, site in self.sites.items()}

    def _settle(self, layer: torch.nn.Module) -> None:
        """Once, in the process that holds the weights: how they are kept there, and in what model.

        Args:
            layer: the first one of it.
        """
        if self._settled:
            return
        self._settled, running, on_cpu = True, get_current_vllm_config(), current_platform.is_cpu()
        model_class = get_model_cls(running.model_config)
        self._standing.watch(layer, model_class, self)
        self._fused, self._endings = _fused_by(model_class), _endings(model_class)
        if self.sites:
            counts = Counter(site.layout for site in self.sites.values())
            told = ", ".join(f"{count} {layout}" for layout, count in counts.most_common())
            logger.info("sparsify: packed weights are held as they are (of the model's: %s)", told)
        asked = asked_policy(running.additional_config, on_cpu=on_cpu)
        if not on_cpu:
            self.how |= {} if asked is None else {"policy": asked}
        elif (asked or self.cpu.get("policy")) == "both":
            self.how |= {"copies": Copies()}
            width = running.model_config.dtype.itemsize
            most = sum(site.height * site.columns for site in self.sites.values() if site.experts is None) * width
            told = f", up to {most / (1 << 20):.0f} MiB of all ranks together" if self.sites else ""
            logger.info("sparsify: policy both: dense copies beside packed weights%s, where dense is faster here", told)

    def _adopt(self) -> None:
        """Give packed parameters that no layer has asked for to the layers that stand where they are called."""
        model = self._standing.model()
        if model is None:
            return
        # What is taken too: ranks of a pipeline have taken others, and tell them to each other by these names.
        self._taken = {name_within(model, name) for name in self._taken}
        self.sites = {name_within(model, name): site for name, site in self.sites.items()}
        for path, layer in layers_of(model):
            if isinstance(layer, RoutedExperts):
                if isinstance(layer.quant_method, UnquantizedFusedMoEMethod):
                    method = self._experts(layer, path)
                    if method is not None:
                        adopt_experts(layer, method)
            elif isinstance(layer.quant_method, UnquantizedLinearMethod):
                awaited = self._awaited(path, head=False)
                if awaited is not None:
                    adopt(layer, SparsifyLinearMethod(awaited, **self.how))

    def _check_taken(self) -> None:
        """Once, on every rank of a pipeline, of which each has a part of the layers."""
        if self._checked:
            return
        self._adopt()
        self._checked, pipeline, taken = True, get_pp_group(), self._taken
        if pipeline.world_size > 1:
            every: list[Any] = [None] * pipeline.world_size
            torch.distributed.all_gather_object(every, taken, group=pipeline.cpu_group)
            taken = set().union(*every)
        lost = sorted(set(self.sites) - taken)
        if lost:
            raise CheckpointError(
                f"packed parameter {lost[0]}",
                found=f"no layer of vLLM's model reads it ({len(lost)} of {len(self.sites)} are not read)",
                do="Serve the folder with `sparsify serve`, or with --model-impl transformers",
            )


def _endings(model_class: Any) -> dict[str, str | None]:
    """What the model's loader renames only where a weight's name ends (the router of AFMoE), for those of ours too that
    end otherwise.
    """
    known = getattr(getattr(model_class, "hf_to_vllm_mapper", None), "orig_to_new_suffix", {})
    ends = ((old, new) for old, new in known.items() if new and old.endswith(".weight") and new.endswith(".weight"))
    return {old + part: new + part for old, new in ends for part in PARTS if part}


def _fused_by(model_class: Any) -> dict[str, list[str]]:
    """Which modules of a checkpoint each fused layer is made of, as the model's loader knows it: of some (StableLM)
    that is all that says it.
    """
    found: dict[str, list[str]] = {}
    mapper = getattr(model_class, "hf_to_vllm_mapper", None)
    for member, (fused, _) in getattr(mapper, "orig_to_new_stacked", {}).items():
        found.setdefault(fused.rpartition(".")[2], []).append(member.rpartition(".")[2])
    return found


def _source_of(config: Any) -> str:
    """The source of vLLM's class for a model. Nothing else says whether it changes tensors before it hands them over,
    or has a loop of its own over them, which knows experts one by one alone (DeepSeek-V3) or stacks in its own layout
    too (Llama 4); its common loader knows ours.
    """
    for name in getattr(config, "architectures", None) or []:
        module = getattr(ModelRegistry.models.get(name), "module_name", None)
        spec = None if module is None else find_spec(module)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).read_text("utf-8")
    return ""


def _check_headers(folder: Path, sites: Mapping[str, PackedSite]) -> None:
    """What the files of a folder say that they hold, before anything is loaded: vLLM's own error of one that is cut off
    names no file, and comes from a process of its own. What is fetched by a hub's name is not there yet.
    """
    if sites and folder.is_dir():
        held, ledger = set(PackedStore(folder, sites).checkpoint.names()), Ledger.of(folder)
        # vLLM misses no tensor of a quantized model, and would compute with whatever lay in its memory.
        if lacking := sorted(ledger.tensors.keys() - held):
            raise ledger.lacks(lacking)
    elif any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        Checkpoint(folder)
