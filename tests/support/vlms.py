"""The smallest seeded models that read images beside text, with text alone and with an image for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from support.families import VISION
from torch import Tensor

IMAGE, LENGTH = 100, 24
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
MROPE = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8}

_BUILD: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=IMAGE,
        # The last layer: one behind those that are read is no part of every transformers' graph.
        vision_feature_layer=-1)),
    "qwen2_vl": lambda: hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(
        text_config=MROPE, vision_config={**QWEN, "embed_dim": 32}, image_token_id=IMAGE)),
    "qwen3_vl": lambda: hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(
        text_config=MROPE, image_token_id=IMAGE, vision_config={
            **QWEN, "out_hidden_size": 32, "intermediate_size": 64, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16})),
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(
        text_config={**TEXT, "sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4,
        image_token_index=IMAGE)),
    "mistral3": lambda: hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(
        text_config=hf.MistralConfig(**TEXT), vision_config=hf.PixtralVisionConfig(**VISION, head_dim=8),
        image_token_index=IMAGE)),
    "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT), vision_config=hf.SiglipVisionConfig(**VISION), projection_dim=32,
        image_token_index=IMAGE)),
    "mllama": lambda: hf.MllamaForConditionalGeneration(hf.MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1]}, image_token_index=IMAGE, vision_config={
            **VISION, "num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 2, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]]})),
    "idefics3": lambda: hf.Idefics3ForConditionalGeneration(hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2)),
    "llama4": lambda: hf.Llama4ForConditionalGeneration(hf.Llama4Config(
        text_config={**TEXT, "num_local_experts": 2, "intermediate_size_mlp": 64}, image_token_index=IMAGE,
        vision_config={**VISION, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
                       "projector_output_dim": 32})),
}  # fmt: skip

VLMS = sorted(_BUILD)


def build(name: str) -> Any:
    """A seeded model in float32 and eval mode."""
    torch.manual_seed(0)
    return _BUILD[name]().eval()


def text(rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 90, (rows, LENGTH), generator=generator)}


def with_image(name: str, seed: int = 0) -> dict[str, Tensor]:
    """One row of text with an image in it, as the model's processor gives it."""
    generator = torch.Generator().manual_seed(seed)
    ids = text(seed=seed)["input_ids"]
    tokens = {"llava": 16, "paligemma": 16, "mllama": 1}.get(name, 4)
    ids[:, 4 : 4 + tokens] = IMAGE
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    kinds = (ids == IMAGE).long()
    if name in ("qwen2_vl", "qwen3_vl"):
        patches = torch.randn(16, 3 * 2 * 8 * 8, generator=generator)
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": kinds}  # fmt: skip
    if name == "mllama":
        tiles = torch.randn(1, 1, 2, 3, 32, 32, generator=generator)
        return {"input_ids": ids, "pixel_values": tiles, "aspect_ratio_ids": torch.ones(1, 1).long(),
                "aspect_ratio_mask": torch.ones(1, 1, 2).long(),
                "cross_attention_mask": torch.ones(1, LENGTH, 1, 2).long()}  # fmt: skip
    more = {
        "gemma3": {"token_type_ids": kinds},
        "paligemma": {"token_type_ids": torch.zeros_like(ids)},
        "mistral3": {"image_sizes": torch.tensor([[32, 32]])},
    }.get(name, {})
    return {"input_ids": ids, "pixel_values": pixels[None] if name == "idefics3" else pixels, **more}
