"""The smallest seeded model of every family that the core captures, with inputs for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

logging.getLogger("transformers").setLevel(logging.ERROR)
hf.utils.logging.disable_progress_bar()

LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**LLAMA, "num_key_value_heads": 2}
MOE = {**GQA, "head_dim": 8}
DEEPSEEK = {
    **LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
# An encoder of text, and one of images.
BERT = {name: value for name, value in LLAMA.items() if "token_id" not in name}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

_BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GQA, sliding_window=8)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GQA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GQA, head_dim=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GQA, pad_token_id=0)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                     max_position_embeddings=64, word_embed_proj_dim=16)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**LLAMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, **TOKENS)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, **TOKENS)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GQA, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**MOE, num_local_experts=4, pad_token_id=0)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=8)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=8, num_heads=8, head_dim=8,
                        n_groups=2, chunk_size=8)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**VISION)),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)),
}  # fmt: skip

FAMILIES = sorted(_BUILD)


def build(family: str, seed: int = 0) -> Any:
    """A seeded model in float32 and eval mode."""
    torch.manual_seed(seed)
    model = _BUILD[family]().eval()
    # Initial norms and biases are all alike, which would hide swapped channels.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def deep(family: str, layers: int) -> Any:
    """The family's model with so many blocks, seeded; norms and biases are as transformers begins with them."""
    model = build(family)
    config = model.config
    for name in ("num_hidden_layers", "n_layer"):
        if name in config.to_dict():
            setattr(config, name, layers)
    if hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]
    torch.manual_seed(0)
    return type(model)(config).eval()


def inputs(family: str, rows: int = 2, length: int = 16, seed: int = 0, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family in ("vit", "convnext"):
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    batch = {"input_ids": torch.randint(3, 60, (rows, length), generator=generator)}
    if family == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 60, (rows, length), generator=generator)
    return batch | more


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits in eager mode."""
    more = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
    with torch.no_grad():
        return model(**batch, **more).logits


def save(family: str, folder: Path, seed: int = 0, **kwargs: Any) -> Path:
    build(family, seed).save_pretrained(folder, **kwargs)
    return folder
