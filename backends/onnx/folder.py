"""The files beside the graph that other runtimes read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify.backends.onnx.running.session import FOLD_LIMIT
from sparsify.backends.onnx.tracing.contract import Contract
from sparsify.files.manifest import write_json
from sparsify.frontend.text_config import text_config

# What onnxruntime-genai calls the families it knows; any other plain decoder is its "decoder".
_GENAI_TYPES = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"}


def genai_config(config: Any, contract: Contract) -> dict[str, Any]:
    """``genai_config.json`` for a decoder of one head count throughout."""
    text = text_config(config)
    key = contract.states[0][0]
    past = {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    lengths = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length"))
    context = next((length for length in lengths if isinstance(length, int)), 2048)
    family = str(getattr(config, "model_type", ""))
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": context,
            "decoder": {
                "session_options": {FOLD_LIMIT: str(1 << 40), "log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": int(key.shape[3]),
                "hidden_size": text.hidden_size,
                "inputs": {name: name for name in contract.inputs} | past,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": len(contract.states),
                "num_key_value_heads": int(key.shape[1]),
            },
            "type": family if family in _GENAI_TYPES else "decoder",
            "vocab_size": text.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            # The graph gives a longer cache at each step: it cannot write into the one it was given.
            "past_present_share_buffer": False,
        },
    }


def write_genai_config(folder: Path, config: Any, contract: Contract) -> None:
    """Write ``genai_config.json`` where the graph is one that genai can hold."""
    if contract.kind == "decoder" and uniform_heads(contract):
        write_json(folder / "genai_config.json", genai_config(config, contract))


def uniform_heads(contract: Contract) -> bool:
    """Whether all keys and values of all layers have one shape, which is all that genai and optimum can say."""
    return len({(s.shape[1], s.shape[3]) for pair in contract.states for s in pair}) == 1
