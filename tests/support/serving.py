"""Models that servers are tested with: small ones whose weights are packed in several ways, and what they generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import sparsify
from sparsify.backends.packed.backend import PackedBackend

PROMPTS = [[5, 9, 33, 7], [100, 200, 210], [17] * 6, [1, 2, 3, 4, 5, 6, 7, 8, 9], [50, 40, 30]]
_SIZES = {
    "vocab_size": 250, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, intermediate_size=320, attention_bias=True)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, intermediate_size=320, tie_word_embeddings=True)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SIZES, intermediate_size=320)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_SIZES, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)
    ),
}

# How a weight is pruned: 2:4, half of it anywhere, or not at all.
Pruned = Callable[[Tensor], Tensor]


def two_of_four(weight: Tensor) -> Tensor:
    kept = weight.abs().unflatten(-1, (-1, 4)).topk(2, dim=-1).indices
    return weight * torch.zeros_like(weight.unflatten(-1, (-1, 4))).scatter_(-1, kept, 1.0).flatten(-2)


def half(weight: Tensor) -> Tensor:
    return weight * (weight.abs() > weight.abs().median())


def dense(weight: Tensor) -> Tensor:
    return weight


def model(family: str, pruned: dict[str, Pruned], layer: int | None = None) -> Any:
    """A seeded model whose parameters are pruned by the first of ``pruned`` that their name holds.

    Args:
        layer: whose parameters alone are; None: all layers'.
    """
    torch.manual_seed(0)
    made = _MODELS[family]().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            how = next((how for part, how in pruned.items() if part in name), None)
            if how is not None and (layer is None or f"layers.{layer}." in name):
                parameter.copy_(how(parameter))
    return made


def packed(made: Any, folder: Path, **options: Any) -> Path:
    """A packed folder of ``made``, in its own dtype: what is zero is left out, wherever that takes less."""
    made.save_pretrained(folder / "dense")
    sparsify.compile(folder / "dense", output=folder / "packed", to=PackedBackend(choice="smallest", **options))
    return folder / "packed"


def generated(folder: Path, prompts: Sequence[Sequence[int]] = PROMPTS, tokens: int = 16) -> list[list[int]]:
    """What transformers generates greedily of each prompt, in float32."""
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        whole = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
        )
        found.append(whole[0, len(prompt) :].tolist())
    return found
