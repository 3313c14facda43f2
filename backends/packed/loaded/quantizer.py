"""How transformers loads a packed folder: ``AutoModelForCausalLM.from_pretrained(OUT)`` after ``import sparsify``.

Only the packed tensors are read; no weight is ever dense in memory. Measured once per shape, layers that were not
packed get our dense kernel where that makes a token faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.backends.packed.config import (
    FIELDS,
    METHOD,
    check_activations,
    check_cpu,
    check_gpu,
    check_measured,
    sites_of,
)
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.loaded.again import choose_again
from sparsify.backends.packed.loaded.attention import speed_up_attention
from sparsify.backends.packed.loaded.known import Known
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.modules import FastLinear, become, count_rows, pack_modules, packed_of
from sparsify.backends.packed.loaded.on_gpu import prepare
from sparsify.backends.packed.store import check_tensors
from sparsify.errors import BackendError, CheckpointError
from sparsify.files.checkpoint import DTYPES
from sparsify.files.ledger import Ledger
from sparsify.files.reading import read_json
from sparsify.files.whole import check_folder
from sparsify.finite import check_all_finite
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.soundness import check
from sparsify.runtime.words import Activations

HELD: Final = "held"


@register_quantization_config(METHOD)
class SparsifyConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed folder.

    Args:
        siblings: groups of parameters that one product serves on a GPU. gpu: how a GPU keeps the weights, {"policy",
            "tune"} as :func:`sparsify.backends.packed.loaded.prepare` takes them. activations: what inputs of weights
            of few bits are multiplied as, int8 or float. measured: the machine that the choice of what to pack was
            measured on. cpu: {"policy"}, which vLLM reads, and which is only handed on here. check: False takes the
            folder's bytes as they are; "held" does not look again, for who loads it has compared all of them. Set it in
            Python, ``config.quantization_config["check"] = False``, and give ``config`` to ``from_pretrained``.

    Raises:
        CheckpointError: a newer format, or entries that are damaged.
    """

    def __init__(
        self,
        sites: dict[str, Any],
        format: int = 1,
        quant_method: str = METHOD,
        siblings: list[list[str]] | None = None,
        gpu: dict[str, Any] | None = None,
        activations: Activations = "int8",
        measured: dict[str, str] | None = None,
        cpu: dict[str, str] | None = None,
        check: bool | Literal["held"] = True,
    ) -> None:
        # Only of this one loading; no file says it.
        self.check = check
        self.quant_method: Any = quant_method
        self.format, self.sites = format, sites
        self.siblings, self.gpu, self.activations = siblings or [], gpu or {}, activations
        self.measured, self.cpu = measured, cpu or {}
        sites_of({"quantization_config": self.__dict__}, "(config.json)")
        check_gpu(self.siblings, self.gpu, sites)
        check_activations(activations)
        check_measured(measured)
        check_cpu(self.cpu)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        # A newer format may have fields of any kind: its number is looked at before them.
        sites_of({"quantization_config": config_dict}, "(config.json)")
        known = {
            k: v for k, v in config_dict.items() if k in FIELDS or (k == "check" and (isinstance(v, bool) or v == HELD))
        }
        return super().from_dict(known, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        unsaid = {
            "check": True,
            "activations": self.format == 1,
            "measured": self.measured is None,
            "cpu": not self.cpu,
        }
        return {key: value for key, value in super().to_dict().items() if not unsaid.get(key)}

    def without(self, names: Sequence[str]) -> None:
        """Forget packed parameters that were made dense."""
        gone = set(names)
        self.sites = {name: entry for name, entry in self.sites.items() if name not in gone}
        kept = ([name for name in group if name not in gone] for group in self.siblings)
        self.siblings = [group for group in kept if len(group) > 1]

    def packed_sites(self) -> dict[str, PackedSite]:
        return {name: PackedSite.of(name, entry) for name, entry in self.sites.items()}


@register_quantizer(METHOD)
class SparsifyQuantizer(HfQuantizer):
    """Replaces modules before the weights are read, and checks what was read."""

    requires_calibration = True
    _ledger: Ledger = Ledger()
    quantization_config: SparsifyConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" in places:
            raise BackendError(
                "loading a packed folder with layers offloaded to disk",
                found="transformers writes offloaded layers back dense",
                do="Give a device_map without 'disk'",
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        sites = self.quantization_config.packed_sites()
        if checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            if "check" in (read_json(folder / "config.json").get("quantization_config") or {}):
                raise CheckpointError(
                    f"config.json of {folder}",
                    found="a quantization_config that says whether it is to be checked",
                    do="Take its line 'check' out: only who loads the folder says that",
                )
            # Before any weight is read; config.json alone was, which is held against the list here too.
            self._ledger = check_folder(folder, self.quantization_config.check is True)
            # transformers fills a tensor that is missing with random numbers and goes on.
            check_tensors(sites, _headers(checkpoint_files), str(checkpoint_files[0]))
        exact = self.quantization_config.activations == "float"
        pack_modules(model, sites, self.quantization_config.siblings, exact=exact)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                for key, value in self.quantization_config.gpu.items():
                    setattr(module.product, key, value)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        sites = self.quantization_config.packed_sites()
        for name, site in sites.items():
            # transformers has every floating tensor ask for a gradient.
            model.get_parameter(name).requires_grad_(False)
            packed = packed_of(model, name, site)
            if not packed.values.is_meta:
                check(name, packed)
        compared = self._ledger.complete or self.quantization_config.check == HELD
        if not compared and not self._ledger.manifest.get("allow_nan"):
            # Where digests were compared, who wrote them has looked.
            check_all_finite((n, p) for n, p in model.named_parameters() if not p.is_meta)
        count_rows(model, sites)
        self.quantization_config.without(choose_again(model, sites, self.quantization_config.measured))
        prepare(model, **self.quantization_config.gpu)
        speed_up_dense(model)
        speed_up_attention(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Dense modules again, with the weights unpacked."""
        from sparsify.backends.packed.loaded.dense import dense_modules

        return dense_modules(model, self.quantization_config.packed_sites(), unpacked)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def speed_up_dense(model: nn.Module) -> list[str]:
    """Give dense layers our kernel for one token where it is measured faster than torch's; the names of those.

    Each shape is timed once on a machine and kept in the cache folder: the next loading neither waits for it nor
    chooses otherwise.
    """
    known, changed = Known("dense.json", "faster", lambda found: isinstance(found, bool)), []
    # Without the flush: loading must not take 64 MiB more than the model, and large layers come from memory anyway.
    watch = Stopwatch(flush=False)

    def faster(weight: torch.Tensor) -> bool:
        timing = watch.dense(weight)
        return timing.dense < timing.torch

    for name, module in model.named_modules():
        plain = type(module) is nn.Linear and not hasattr(module, "_hf_hook")
        if plain and module.weight.device.type == "cpu" and module.weight.dtype.is_floating_point:
            key = f"{'x'.join(map(str, module.weight.shape))} {str(module.weight.dtype).removeprefix('torch.')}"
            if known.of(key, partial(faster, module.weight)):
                become(module, FastLinear)
                changed.append(name)
    known.keep()
    return changed


def _headers(files: list[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of safetensors files."""
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    found[name] = (tuple(part.get_shape()), DTYPES.get(part.get_dtype(), torch.bool))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"packed weights {path}", found=f"not a sound safetensors file ({error})", do="Fetch it again"
            ) from error
    return found
