"""Small seeded models that are no plain language models, with a batch for each as its user would give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.families import BERT, GQA, LLAMA, VISION
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

TEXT = {**LLAMA, "pad_token_id": 0}
BESIDE = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "eos_token_id": 2,
    "bos_token_id": 1, "decoder_start_token_id": 3,
}  # fmt: skip
WAVES = {
    **{name: value for name, value in BERT.items() if name != "max_position_embeddings"}, "pad_token_id": 0,
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def needs_type(kind: str) -> pytest.MarkDecorator:
    """Skips where the installed transformers is older than this type of model."""
    return pytest.mark.skipif(kind not in CONFIG_MAPPING_NAMES, reason=f"transformers {hf.__version__} has no {kind}")


def _whisper() -> Any:
    config = hf.WhisperConfig(**BESIDE, num_mel_bins=8, max_source_positions=20, max_target_positions=24)
    return hf.WhisperForConditionalGeneration(config)


def _falcon_h1() -> Any:
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    return hf.FalconH1ForCausalLM(hf.FalconH1Config(**GQA, head_dim=8, mamba_chunk_size=8, **mamba))


def _rwkv() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64}
    return hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=64, context_length=64, **sizes))


def _lfm2() -> Any:
    layers = ["conv", "full_attention"]
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(**GQA, pad_token_id=0, block_auto_adjust_ff_dim=False, layer_types=layers))


def _llava() -> Any:
    parts = {"vision_config": hf.CLIPVisionConfig(**VISION), "text_config": hf.LlamaConfig(**GQA)}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts, image_token_id=63, vision_feature_layer=-1))


def _qwen2_vl() -> Any:
    text = {**GQA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 8, "mlp_ratio": 2}
    tokens = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


KINDS: dict[str, Callable[[], Any]] = {
    "whisper": _whisper,
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)),
    "siglip": lambda: hf.SiglipModel(
        hf.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**BESIDE, decoder_vocab_size=64, max_position_embeddings=64)),
    "rwkv": _rwkv,
    "falcon_h1": _falcon_h1,
    "lfm2": _lfm2,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAVES)),
    "hubert": lambda: hf.HubertForCTC(hf.HubertConfig(**WAVES)),
    "classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GQA, num_labels=3)),
    "reward": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GQA, num_labels=1)),
    "tagger": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=3)),
    "informer": lambda: hf.InformerModel(
        hf.InformerConfig(prediction_length=4, context_length=8, lags_sequence=[1, 2], d_model=32, encoder_ffn_dim=64,
                          decoder_ffn_dim=64, num_time_features=0)),
    # Its query and key layers read tokens and a table of relative positions.
    "deberta": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
                           norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0)),
    "embedding": lambda: hf.Qwen3Model(hf.Qwen3Config(**GQA, head_dim=8)),
}  # fmt: skip


def build(kind: str) -> Any:
    """A seeded model in float32 and eval mode, no two of its norms and biases alike."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "time_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(kind: str, folder: Path) -> Path:
    build(kind).save_pretrained(folder)
    return folder


def batch(kind: str, rows: int = 2) -> dict[str, Tensor]:
    """Inputs for the model, seeded."""
    generator = torch.Generator().manual_seed(0)
    # Classifiers without a padding token read one sequence at a time.
    rows, length = (1 if kind in ("classifier", "reward") else rows), (5 if kind == "rwkv" else 12)
    ids = torch.randint(4, 60, (rows, length), generator=generator)
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 8, 40, generator=generator), "decoder_input_ids": ids}
    if kind == "qwen2_vl":
        # An image of 4 × 4 patches, four of which become one token.
        ids[:, 2], ids[:, 3:7] = 61, 63
        grid, patches = torch.tensor([[1, 4, 4]] * rows), torch.randn(16 * rows, 3 * 2 * 8 * 8, generator=generator)
        images = {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == 63).long()}
        return {"input_ids": ids} | images
    if kind == "marian":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    if kind in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(rows, 400, generator=generator)}
    if kind == "informer":
        past, future = torch.rand(rows, 10, generator=generator), torch.rand(rows, 4, generator=generator)
        # A series without features beside it.
        return {"past_values": past, "past_time_features": torch.zeros(rows, 10, 0), "past_observed_mask": past > -1,
                "future_values": future, "future_time_features": torch.zeros(rows, 4, 0)}  # fmt: skip
    if kind == "deberta":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids}


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """What the model is for: its logits, its similarities, or its last hidden states."""
    more = {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}
    with torch.no_grad():
        out = model(**given, **more)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in out:
            found: Tensor = out[name]
            return found
    raise AssertionError(f"no known output in {list(out)}")
