"""config.json of the dense model that a quantized folder holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODELOPT, AUTO_GPTQ, AUTO_AWQ = "hf_quant_config.json", "quantize_config.json", "quant_config.json"
# Files beside config.json in which libraries say it: a dense folder does without them.
LEFT_OUT = frozenset({MODELOPT, AUTO_GPTQ, AUTO_AWQ})
# Where a config says how weights are quantized; the second is what compressed-tensors wrote at first.
QUANTIZATION = ("quantization_config", "compression_config")


def dense_config(config: dict[str, Any], to: torch.dtype) -> dict[str, Any]:
    """``config`` without what speaks of quantization, and with ``to`` as the dtype of the weights, in its parts too."""
    word = str(to).removeprefix("torch.")
    dense = without_quantization(config)
    dense["torch_dtype" if "torch_dtype" in dense and "dtype" not in dense else "dtype"] = word
    for key, value in dense.items():
        if isinstance(value, dict) and key.endswith("_config"):
            dense[key] = {k: word if k in ("dtype", "torch_dtype") else v for k, v in value.items()}
    return dense


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without what speaks of quantization."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION}
    return {
        key: {k: v for k, v in value.items() if k not in QUANTIZATION}
        if isinstance(value, dict) and key.endswith("_config")
        else value
        for key, value in kept.items()
    }


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What ``config`` says of quantization, itself or in one of its parts; None: nothing."""
    parts = [value for key, value in config.items() if isinstance(value, dict) and key.endswith("_config")]
    for part in (config, *parts):
        for key in QUANTIZATION:
            if isinstance(part.get(key), dict):
                return dict(part[key])
    return None
