"""Inputs that names and sizes do not tell: data, by model type.

An input is ("ids", *shape), ("normal", *shape), ("ones", *shape), ("zeros", *shape), ("below", n, *shape) for whole
numbers from 0 to n - 1, ("counts", n, *shape) for such as floats, or ("value", nested list).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SERIES = {
    "past_values": ("normal", 2, 10), "past_time_features": ("normal", 2, 10, 2),
    "past_observed_mask": ("ones", 2, 10), "future_values": ("normal", 2, 4),
    "future_time_features": ("normal", 2, 4, 2),
}  # fmt: skip
_IMAGE = ("normal", 2, 3, 32, 32)
_BOXES = ("value", [[[1, 2, 5, 7]] * 16] * 2)
_PATCHES = {
    "pixel_values": ("normal", 2, 16, 192), "pixel_attention_mask": ("ones", 2, 16),
    "spatial_shapes": ("value", [[4, 4], [4, 4]]),
}  # fmt: skip
_CODES = {"input_ids": ("ids", 2, 16), "attention_mask": ("ones", 2, 16), "decoder_input_ids": ("below", 60, 4, 16)}
_TWO_GRIDS = ("value", [[1, 4, 4]] * 2)
# Two images of 16 patches, each a row of its pixels.
_ROWS_OF_PIXELS = {"pixel_values": ("normal", 32, 192), "grid_thw": _TWO_GRIDS}
# With patches of two frames.
_OF_TWO_FRAMES = {"pixel_values": ("normal", 32, 384), "grid_thw": _TWO_GRIDS}
_IN_WINDOWS = {"pixel_values": ("normal", 64, 384), "grid_thw": ("value", [[1, 8, 8]])}
_IN_A_STRIP = {"pixel_values": ("normal", 1, 3, 8, 256), "target_sizes": ("value", [[4, 4]] * 2)}
_LINE = {"pixel_values": ("normal", 2, 3, 48, 128)}
_SQUARE = {"pixel_values": ("normal", 2, 3, 64, 64)}
_MONO = {"input_values": ("normal", 2, 1, 3200)}
_LATENTS = {"latents": ("normal", 2, 32, 6)}
GIVEN: dict[str, dict[str, tuple[Any, ...]]] = {
    "gemma3n_audio": {
        "audio_mel": ("normal", 2, 64, 128), "audio_mel_mask": ("value", [[False] * 56 + [True] * 8] * 2),
    },
    "gemma4_vision": {
        "pixel_values": ("normal", 2, 36, 192),
        "pixel_position_ids": ("value", [[[x, y] for y in range(6) for x in range(6)]] * 2),
    },
    "hunyuan_vl_vision": _ROWS_OF_PIXELS,
    "hy_v4_vl_vision": _ROWS_OF_PIXELS,
    "glm_image_vision": _ROWS_OF_PIXELS,
    "cosmos3_edge_vision": _ROWS_OF_PIXELS,
    "lfm3_vl_vision": _OF_TWO_FRAMES,
    "muse_glimmer_vision": _IN_WINDOWS,
    "muse_spark_vision": _IN_WINDOWS,
    "kimi_k25_vision": {"pixel_values": ("normal", 32, 3, 8, 8), "grid_thw": _TWO_GRIDS},
    "minicpm_ocr_vision": _IN_A_STRIP,
    "minicpmv4_7_vision": _IN_A_STRIP,
    "inkling2_vision": {"pixel_values": ("normal", 8, 16, 16, 3), "image_grid_thw": ("value", [[1, 2, 2]] * 2)},
    "muse_glimmer_assistant": {
        "noise_embeds": ("normal", 2, 4, 32), "context_hidden_states": ("normal", 2, 8, 128),
    },
    "muse_spark_audio": {"input_values": ("normal", 2, 3840)},
    "jev": {
        "input_ids": ("ids", 1, 16), "marks": ("value", [[8, 16]]), "num_options": ("value", [[2, 3]]),
        "question_type_ids": ("value", [[0, 1]]),
    },
    # A tower of timm's smallest: 160 pixels a side.
    "timm_wrapper": {"pixel_values": ("normal", 2, 3, 160, 160)},
    "timm_backbone": {"pixel_values": ("normal", 2, 3, 160, 160)},
    "gemma3n_vision": {"pixel_values": ("normal", 2, 3, 160, 160)},
    "pe_video": {"input_ids": ("ids", 2, 16), "pixel_values_videos": ("normal", 2, 2, 3, 160, 160)},
    "pe_video_encoder": {"pixel_values_videos": ("normal", 2, 2, 3, 160, 160)},
    "pe_audio": {"input_ids": ("ids", 2, 16), "input_values": ("normal", 2, 1, 7680)},
    "pe_audio_video_encoder": {
        "input_values": ("normal", 2, 1, 7680), "pixel_values_videos": ("normal", 2, 2, 3, 160, 160),
    },
    "pe_audio_video": {
        "input_ids": ("ids", 2, 16), "pixel_values_videos": ("normal", 2, 2, 3, 160, 160),
        "input_values": ("normal", 2, 1, 7680),
    },
    "edgetam_vision_model": {"pixel_values": ("normal", 2, 3, 160, 160)},
    "edgetam": {"pixel_values": ("normal", 2, 3, 160, 160), "input_points": ("value", [[[[20.0, 30.0]]]] * 2)},
    "clvp": {"input_ids": ("ids", 2, 16), "input_features": ("normal", 2, 32, 40)},
    "univnet": {"input_features": ("normal", 2, 8, 16), "noise_sequence": ("normal", 2, 8, 32)},
    "xcodec": _MONO,
    "xcodec2": {"input_values": ("normal", 2, 1, 3200), "input_features": ("normal", 2, 10, 32)},
    "neucodec": {"input_values": ("normal", 2, 1, 3200), "input_features": ("normal", 2, 10, 32)},
    "vibevoice_acoustic_tokenizer": _MONO,
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": ("normal", 2, 1, 3200)},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": ("normal", 2, 16, 6)},
    "fun_asr_nano_encoder": {"input_features": ("normal", 2, 20, 112), "input_features_mask": ("ones", 2, 20)},
    # transformers lays its positions out for one row alone.
    "tvp": {
        "input_ids": ("ids", 1, 16), "pixel_values": ("normal", 1, 2, 3, 64, 64), "attention_mask": ("ones", 1, 16),
    },
    "speech-encoder-decoder": {"inputs": ("normal", 2, 2000), "decoder_input_ids": ("ids", 2, 16)},
    "pi0": {
        "state": ("normal", 2, 8), "noise": ("normal", 2, 8, 32), "timestep": ("value", [0.25, 0.75]),
        "input_ids": ("ids", 2, 24), "attention_mask": ("ones", 2, 24), "pixel_values": ("normal", 2, 1, 3, 32, 32),
        "pixel_attention_mask": ("value", [[True]] * 2),
    },
    "efficientloftr": {"pixel_values": ("normal", 1, 2, 3, 96, 96)},
    "depth_pro": {"pixel_values": ("normal", 2, 3, 128, 128)},
    "pp_ocrv5_mobile_rec": {"pixel_values": ("normal", 2, 3, 96, 128)},
    "pp_ocrv5_server_rec": _LINE,
    "pp_ocrv6_small_rec": _LINE,
    "pp_ocrv6_tiny_rec": _LINE,
    "uvdoc": {"pixel_values": ("normal", 2, 3, 128, 128)},
    "pp_ocrv5_server_det": _SQUARE,
    "pp_ocrv6_medium_det": _SQUARE,
    "pp_ocrv6_small_det": _SQUARE,
    "mimi_decoder": _LATENTS,
    "pocket_tts_audio_tokenizer_decoder": _LATENTS,
    "seggpt": dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), _IMAGE),
    "oneformer": {"pixel_values": ("normal", 2, 3, 64, 64), "task_inputs": ("ids", 2, 8)},
    "omdet-turbo": {
        "pixel_values": ("normal", 2, 3, 64, 64), "classes_input_ids": ("ids", 4, 8),
        "classes_attention_mask": ("ones", 4, 8), "tasks_input_ids": ("ids", 2, 8),
        "tasks_attention_mask": ("ones", 2, 8), "classes_structure": ("value", [2, 2]),
    },
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    # Its last level of features has more than one place.
    "deformable_detr": {"pixel_values": ("normal", 2, 3, 96, 96)},
    "idefics": {
        "input_ids": ("ids", 2, 16), "attention_mask": ("ones", 2, 16), "pixel_values": ("normal", 2, 1, 3, 32, 32),
        "image_attention_mask": ("ones", 2, 16, 1),
    },
    "siglip2": {"input_ids": ("ids", 2, 16)} | _PATCHES,
    "siglip2_vision_model": _PATCHES,
    "lilt": {"input_ids": ("ids", 2, 16), "bbox": _BOXES},
    "layoutlmv3": {"input_ids": ("ids", 2, 16), "bbox": _BOXES, "pixel_values": _IMAGE},
    "kosmos-2": {
        "pixel_values": _IMAGE, "input_ids": ("ids", 2, 16),
        "image_embeds_position_mask": ("value", [[0] * 2 + [1] * 4 + [0] * 10] * 2),
    },
    "instructblip": {"pixel_values": _IMAGE, "qformer_input_ids": ("ids", 2, 8), "input_ids": ("ids", 2, 16)},
    "instructblipvideo": {
        "pixel_values": ("normal", 2, 4, 3, 32, 32), "qformer_input_ids": ("ids", 2, 8), "input_ids": ("ids", 2, 24),
    },
    "pix2struct": {"flattened_patches": ("counts", 4, 2, 16, 34), "decoder_input_ids": ("ids", 2, 16)},
    "voxtral_realtime": {"input_ids": ("ids", 2, 16), "input_features": ("normal", 2, 16, 128)},
    "lxmert": {
        "input_ids": ("ids", 2, 16), "visual_feats": ("normal", 2, 4, 32), "visual_pos": ("normal", 2, 4, 4),
    },
    "kyutai_speech_to_text": {"input_ids": ("below", 60, 2, 16, 3)},
    "vit_mae": {"pixel_values": _IMAGE, "noise": ("normal", 2, 16)},
    "qwen3_asr_encoder": {"input_features": ("normal", 2, 16, 100), "input_features_mask": ("ones", 2, 100)},
    "clap": {"input_ids": ("ids", 2, 16), "input_features": ("normal", 2, 1, 128, 32)},
    "decision_transformer": {
        "states": ("normal", 2, 5, 8), "actions": ("normal", 2, 5, 4), "returns_to_go": ("normal", 2, 5, 1),
        "timesteps": ("below", 32, 2, 5), "attention_mask": ("ones", 2, 5),
    },
    "video_llama_3_vision": {
        "pixel_values": ("normal", 32, 192), "grid_thw": ("value", [[1, 4, 4]] * 2), "merge_sizes": ("value", [1, 1]),
    },
    "blip_2_qformer": {"query_embeds": ("normal", 2, 4, 32), "encoder_hidden_states": ("normal", 2, 6, 32)},
    "audioflamingo3_encoder": {"input_features": ("normal", 2, 16, 128), "input_features_mask": ("ones", 2, 128)},
    "granite_speech5_ctc": {"input_features": ("normal", 2, 32, 64)},
    "granite_speech5_encoder": {"input_features": ("normal", 2, 32, 64)},
    "musicgen": _CODES,
    "musicgen_melody": _CODES,
    "dia": {"input_ids": ("ids", 2, 16), "decoder_input_ids": ("ids", 2, 16, 9)},
}  # fmt: skip


def draw(spec: tuple[Any, ...], low: int, high: int, generator: torch.Generator) -> Tensor:
    """The input that ``spec`` says; ids lie in [low, high)."""
    what, *shape = spec
    if what == "value":
        return torch.tensor(shape[0])
    if what in ("ones", "zeros"):
        return torch.full(shape, int(what == "ones"))
    if what == "normal":
        return torch.randn(*shape, generator=generator)
    if what in ("below", "counts"):
        low, high, *shape = 0, *shape
    drawn = torch.randint(low, high, shape, generator=generator)
    return drawn.float() if what == "counts" else drawn
