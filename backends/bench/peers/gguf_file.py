"""A model of transformers as a GGUF file for llama.cpp: dense ones of the families that are built like Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import BackendError

# transformers' ``model_type``: llama.cpp's name of the architecture.
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}


def write_gguf(model: Any, path: Path) -> str:
    """Write ``model`` with its own numbers, matrices in its dtype and vectors in float32; no tokenizer.

    Returns:
        What llama.cpp calls that dtype: ``BF16``, ``F16`` or ``F32``.

    Raises:
        BackendError: a model that the file cannot hold, or that llama.cpp would compute in another way.
    """
    import gguf

    config = model.config
    architecture = _architecture(config)
    kind = _kind(model)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    factors = _rope_factors(model, head)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _cannot(config, f"{name}, which llama.cpp's {gguf.MODEL_ARCH_NAMES[architecture]} has no tensor for")
        if architecture == gguf.MODEL_ARCH.LLAMA and ".self_attn." in name:
            value = _in_pairs(name, value, config)
        _add(writer, found, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kind


def _architecture(config: Any) -> Any:
    """Which of llama.cpp's it is."""
    import gguf

    name = _ARCHITECTURES.get(config.model_type)
    if name is None:
        raise _cannot(config, f"a model of type {config.model_type}; {', '.join(_ARCHITECTURES)} are known")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise _cannot(config, f"the activation {config.hidden_act}, where llama.cpp computes silu")
    windowed = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if windowed or (config.model_type == "mistral" and config.sliding_window):
        raise _cannot(config, "attention within a window, which this writer does not say")
    if getattr(config, "quantization_config", None) is not None:
        raise _cannot(config, "weights that are stored quantized; give the dense model with --against")
    return gguf.MODEL_ARCH[name]


def _kind(model: Any) -> str:
    dtype = next(model.parameters()).dtype
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    if dtype not in kinds:
        raise _cannot(model.config, f"weights of {dtype}")
    return kinds[dtype]


def _rope_factors(model: Any, head: int) -> Tensor | None:
    """By what each frequency [head / 2] of the rotary embedding is divided; None where that is 1."""
    rope = model.config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("llama3", "linear") or _ARCHITECTURES[model.config.model_type] != "LLAMA":
        raise _cannot(model.config, f"positions that are scaled by {kind}")
    plain = rope["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float32) / head)
    return plain / model.model.rotary_emb.inv_freq.float().cpu()


def _in_pairs(name: str, value: Tensor, config: Any) -> Tensor:
    """llama.cpp turns neighbouring rows of q and k, transformers those of a head's two halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return value
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)


def _add(writer: Any, name: str, value: Tensor, kind: str) -> None:
    import gguf

    if value.dim() < 2:
        writer.add_tensor(name, value.float().contiguous().numpy())
        return
    raw = value.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])


def _cannot(config: Any, found: str) -> BackendError:
    place = getattr(config, "_name_or_path", "") or "the model"
    return BackendError(f"{place} as a GGUF file", found=found, do="Convert it with llama.cpp's own tools")
