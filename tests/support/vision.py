"""Small models that read text and images, with processors made where they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from support.tokenizers import of_bytes


def llava(folder: Path, **text: Any) -> Path:
    """A LLaVA of two blocks for each kind, images of 4 patches, and its processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = of_bytes()
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 16, "patch_size": 8, "projection_dim": 32}
    language = {"model_type": "llama", **sizes, "vocab_size": 264, "max_position_embeddings": 128, "use_cache": False}
    config = hf.LlavaConfig(
        vision_config=vision, text_config=language | text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    hf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pictures(folder: Path, sizes: Iterable[tuple[int, int]]) -> list[str]:
    """Images of these sizes in ``folder``/pictures, of other colours each, by their paths relative to ``folder``."""
    from PIL import Image

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    names = []
    for number, size in enumerate(sizes):
        names.append(f"pictures/{number}.png")
        Image.new("RGB", size, (9 * number % 256, 255 - 20 * number % 256, 30)).save(folder / names[-1])
    return names


def asks(text: str, *images: Any) -> dict[str, Any]:
    """A row of a file of conversations."""
    content = [*({"type": "image", "path": image} for image in images), {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a thing"}]}


def written(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)
