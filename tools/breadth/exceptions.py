"""What the rules of :mod:`breadth.shrink` cannot know: data, by model type."""

from __future__ import annotations

from typing import Any

from breadth.pictures import SIZES as _PICTURES

# Values for fields of a config class ("+NAME": for what is no field). "FIELD:class" names the model type of one
# of its parts that has no default, "FIELD:model" that of one that takes the default's place
# (or both it and values of its own).
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2}
# With few heads of the index the scores of many tokens are 0, and which of them are looked at is anybody's choice.
_INDEX = {"index_n_heads": 16, "index_topk": 8}
SIZES: dict[str, dict[str, Any]] = _PICTURES | {
    "deepseek_v32": _INDEX,
    "glm_moe_dsa": _INDEX,
    "axk2": _INDEX,
    "hy_v4": {"index_n_heads": 16, "index_topk": 64},
    "hy_v4_vl_text": {"index_n_heads": 16, "index_topk": 64},
    "mistral_large4_text": _INDEX,
    "autoformer": _SERIES | {"label_length": 4, "moving_average": 3},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "bridgetower_text_model": {"hidden_size": 64, "num_attention_heads": 4},
    "bridgetower_vision_model": {"hidden_size": 64},
    "bridgetower": {"hidden_size": 64, "contrastive_hidden_size": 32, "num_attention_heads": 4},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101}},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_0|>": 101}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "esm": {
        "vocab_size": 64,
        "mask_token_id": 32,
        "pad_token_id": 1,
        "token_dropout": False,
        "position_embedding_type": "rotary",
    },
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32},
    "align": {"projection_dim": 80},
    "clap_audio_model": {"spec_size": 64, "num_mel_bins": 32, "hidden_size": 256, "window_size": 2},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 4},
    "step3p5": {"sliding_window": 8},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granite_speech5_encoder": {"context_size": 16},
    "granite_speech_encoder": {"context_size": 16},
    "bros": {"hidden_size": 64},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 128,
        "split_ngram_parts": 4,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 16],
        "max_position_embeddings": 16,
        "num_attention_heads": 4,
        "hash_seed": 0,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
    },
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "glm5_next_text": {"index_topk": 16, "index_kpool": 16},
    "zamba": {
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "dbrx": {"attn_config": {"+rope_theta": 10000.0, "clip_qkv": 8.0}},
    "mimi": {
        "hidden_size": 32,
        "upsample_groups": 32,
        "num_filters": 4,
        "vector_quantization_hidden_dimension": 16,
        "codebook_dim": 16,
    },
    "encodec": {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16},
    "vibevoice_acoustic_tokenizer_encoder": {
        "downsampling_ratios": [2, 4],
        "depths": [1, 1, 1],
        "num_filters": 8,
        "hidden_size": 16,
    },
    "vibevoice_acoustic_tokenizer_decoder": {
        "downsampling_ratios": [2, 4],
        "depths": [1, 1, 1],
        "num_filters": 8,
        "hidden_size": 16,
    },
    "vibevoice_acoustic_tokenizer": {
        "vae_std": 0.0,
        "downsampling_ratios": [2, 4],
        "depths": [1, 1, 1],
        "num_filters": 8,
        "hidden_size": 16,
    },
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 64},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 32]},
    # Of layers that only keep states transformers itself cannot generate.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "fun_asr_nano_adaptor": {"intermediate_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "chameleon_vqgan": {"resolution": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "mimi_decoder": {"num_filters": 4},
    "pocket_tts_audio_tokenizer_decoder": {"num_filters": 4},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    # Its rotary part is never narrower than 32.
    "clvp_encoder": {"hidden_size": 64, "num_attention_heads": 2},
    "clvp": {"decoder_config": {"decoder_fixing_codes": [83, 45, 45, 48]}},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config": {"model_in_dim": 16}},
    "apertus1p5": {
        "image_token_offset": 96,
        "audio_token_offset": 112,
        "vision_config": {"codebook_size": 16},
        "audio_config": {"codebook_size": 16},
    },
    "univnet": {"kernel_predictor_hidden_channels": 32},
    "xcodec": {"codebook_dim": 544},
    "xcodec2": {"quantization_dim": 64},
    "neucodec": {"quantization_dim": 64},
    "moonshine_streaming": {"+num_key_value_heads": 4},
    "shieldgemma2": {"+yes_token_index": 100, "+no_token_index": 101},
    "dots3_note_text": _INDEX
    | {
        "+swa_num_attention_heads": 4,
        "+swa_num_key_value_heads": 4,
        "+swa_q_lora_rank": 16,
        "+swa_kv_lora_rank": 16,
        "+swa_head_dim": 16,
        "+swa_qk_nope_head_dim": 8,
        "+swa_v_head_dim": 8,
    },
    "vits": {"noise_scale": 0.0, "noise_scale_duration": 0.0},
    "t5gemma2_encoder": {"text_config": {"+dropout_rate": 0.0}},
    "nemotron3_5_transcribe_audio": {"chunk_length": 500},
    "nemotron3_diarization": {"chunk_length": 340},
}
# Of text models whose rotary frequencies are those of time, height and width: how many of each, by how many there are.
_SECTIONS = {4: [2, 1, 1], 2: [1, 1, 0]}
MROPE: dict[str, dict[int, list[int]]] = dict.fromkeys(
    (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen2_5_omni_text",
        "qwen2_5_omni_talker",
        "qwen3_vl_text",
        "qwen3_vl_moe_text",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_talker_text",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "qwen4_exp_text",
        "paddleocr_vl_text",
        "glm4v_text",
        "glm4v_moe_text",
        "glm_image_text",
        "glm_ocr_text",
        "hy_v4_vl_text",
        "cosmos3_edge_text",
        "cohere_compass_text",
    ),
    _SECTIONS,
) | {"ernie4_5_vl_moe_text": {4: [1, 1, 2]}, "hunyuan_vl_text": {4: [1, 1, 1, 1]}}
# How many tokens stand for one image, or for sound, in the text that goes with it.
IMAGE_TOKENS: dict[str, int] = {"pi0": 16, "blip-2": 4, "instructblip": 4, "instructblipvideo": 16, "higgs_audio_v2": 4}
_SESSION = "its forward takes a session object that holds a video, not tensors"
_SHARED = "its forward takes a dict of another model's keys and values, not tensors"
# Types of which no tiny model can be tried, and why; one that gives no such reason says itself why not.
CANNOT: dict[str, str] = {
    "sam2_video": _SESSION,
    "sam3_tracker_video": _SESSION,
    "sam3_video": _SESSION,
    "edgetam_video": _SESSION,
    "gemma4_assistant": _SHARED,
    "gemma4_unified_assistant": _SHARED,
    "jev": "transformers does not say what it misses in a saved one (output_loading_info)",
    "dinat": "it requires the natten library, which is compiled for a device",
    "layoutlmv2": "it requires the detectron2 library, which is not on PyPI",
    "higgs_audio_v2_tokenizer": "it requires the torchaudio library",
    "timm_backbone": "transformers takes the folder of a saved one for the name of an architecture of timm",
}
