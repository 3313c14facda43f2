"""What the config.json of a packed folder says: read with care, for it may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsify.backends.packed.format import PackedSite
from sparsify.errors import CheckpointError
from sparsify.runtime.words import ACTIVATIONS, COPY_POLICIES, POLICIES

METHOD = "sparsify"
# The newest format that is read; written are format 1, or 2 where some weight is of few bits.
FORMAT, _FEW_BITS = 2, 2
_DAMAGED = "config.json is damaged: fetch the folder again, or pack it again"
# What quantization_config may say beside ``note``.
FIELDS = ("quant_method", "format", "sites", "siblings", "gpu", "cpu", "activations", "measured")


def format_of(sites: Mapping[str, PackedSite]) -> int:
    """The format of a folder with these packed parameters."""
    return _FEW_BITS if any(site.bits is not None for site in sites.values()) else 1


def without_packing(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json whose weights are dense again."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD:
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config


def sites_of(config: Mapping[str, Any], where: str) -> dict[str, PackedSite] | None:
    """The packed parameters that a config.json speaks of; None where it is not of a packed folder.

    Raises:
        CheckpointError: a newer format, or entries that are damaged.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != METHOD:
        return None
    version = quantization.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"packed folder {where}", found=f"format {version!r}", do=_DAMAGED)
    if version > FORMAT:
        raise CheckpointError(
            f"packed folder {where}",
            found=f"format {version}; this sparsify reads up to {FORMAT}",
            do="Install a newer sparsify (pip install -U sparsify-fx)",
        )
    sites = quantization.get("sites")
    if not isinstance(sites, Mapping) or not sites:
        raise CheckpointError(f"packed folder {where}", found="no sites in it", do=_DAMAGED)
    found = {str(name): PackedSite.of(str(name), entry) for name, entry in sites.items()}
    if version < format_of(found):
        raise CheckpointError(
            f"packed folder {where}",
            found=f"parameters of few bits in format {version}",
            do=_DAMAGED,
        )
    return found


def check_activations(activations: object) -> None:
    """Raises:
    CheckpointError: not how inputs may be multiplied.
    """
    if activations not in ACTIVATIONS:
        raise CheckpointError(
            "quantization_config of a packed folder",
            found=f"activations {activations!r}",
            do=f"{_DAMAGED}; activations are {' or '.join(ACTIVATIONS)}",
        )


def check_measured(measured: object) -> None:
    """Raises:
    CheckpointError: not a machine that a choice was measured on.
    """
    if measured is None:
        return
    words = dict(measured) if isinstance(measured, Mapping) else {}
    if set(words) != {"processor", "instructions"} or not all(isinstance(word, str) for word in words.values()):
        raise CheckpointError(
            "quantization_config of a packed folder", found=f"measured {measured!r}", do="config.json is damaged"
        )


def check_cpu(cpu: object) -> None:
    """Check what a config.json says of CPUs, {"policy": …} or nothing.

    Raises:
        CheckpointError: it is of another kind.
    """
    if not isinstance(cpu, Mapping) or not set(cpu) <= {"policy"} or cpu.get("policy", "decode") not in COPY_POLICIES:
        raise CheckpointError(
            "quantization_config of a packed folder",
            found=f"cpu {cpu!r}",
            do=f"{_DAMAGED}; the policy of CPUs is {' or '.join(COPY_POLICIES)}",
        )


def check_gpu(siblings: object, gpu: object, sites: Mapping[str, object]) -> None:
    """Check what a config.json says of GPUs.

    Args:
        siblings: groups of names of ``sites``. gpu: {"policy": …, "tune": …}.

    Raises:
        CheckpointError: it is of another kind, or names what is not packed.
    """
    found = None
    if not isinstance(siblings, list) or not all(isinstance(group, list) for group in siblings):
        found = f"siblings {siblings!r}"
    elif lost := [name for group in siblings for name in group if not isinstance(name, str) or name not in sites]:
        found = f"a sibling {lost[0]!r} that is not packed"
    elif not isinstance(gpu, Mapping) or not set(gpu) <= {"policy", "tune"}:
        found = f"gpu {gpu!r}"
    elif gpu.get("policy", POLICIES[0]) not in POLICIES or not isinstance(gpu.get("tune", True), bool):
        found = f"gpu {dict(gpu)!r}"
    if found is not None:
        raise CheckpointError("quantization_config of a packed folder", found=found, do=_DAMAGED)
