"""Sizes of models that see pictures, and of what such are built around: data, as in :mod:`breadth.exceptions`."""

from __future__ import annotations

from typing import Any

_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "backbone_config:model": "resnet",
}
_HGNET = {
    "stem_channels": [3, 8, 8],
    "hidden_sizes": [16, 16, 16, 32],
    "stage_in_channels": [8, 16, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 16, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "depths": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "embedding_size": 8,
}
_FOUR = {"num_hidden_layers": 4, "+out_indices": [1, 2, 3, 4]}
_SIDES = {"long": (7, 3), "mid": (5, 2), "short": (3, 1)}
_TEXT_FINDER = {
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
    "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    | {f"vertical_long_to_small_conv_{n}ratio": [[k, 1], [1, 1], [p, 0]] for n, (k, p) in _SIDES.items()}
    | {f"horizontal_small_to_long_conv_{n}ratio": [[1, k], [1, 1], [0, p]] for n, (k, p) in _SIDES.items()}
    | {f"symmetric_conv_long_{n}ratio": [[k, k], [1, 1], [p, p]] for n, (k, p) in _SIDES.items()},
}
_LCNET_V4 = {
    "stem_channels": [3, 8, 16],
    "block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 16, 2, False]],
        [[3, 16, 32, 2, False], [3, 32, 32, 1, True]],
        [[3, 32, 32, 2, False]],
    ],
    "+out_indices": [1, 2, 3, 4],
}
_TOWER = {"vision_config": {"architecture": "test_vit"}}
SIZES: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 8, "embedding_size": 16, "hidden_sizes": [32, 64]},
    "hgnet_v2": _HGNET,
    "d_fine": {"encoder_in_channels": [16, 16, 32], "encode_proj_layers": [2], "decoder_in_channels": [32, 32, 32]},
    "depth_anything": {"backbone_config": _FOUR},
    "prompt_depth_anything": {"backbone_config": _FOUR},
    "tipsv2_dpt": {"backbone_config": _FOUR},
    "zoedepth": {"backbone_config": _FOUR},
    "mobilevitv2": {"image_size": 64},
    "sam_hq_vision_model": {"num_pos_feats": 16},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "superpoint": {"keypoint_decoder_dim": 65},
    "levit": {"image_size": 64, "patch_size": 16},
    "sam_vision_model": {"num_pos_feats": 16},
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam2_prompt_encoder": {"image_size": 64, "patch_size": 16},
    "vitmatte": {"backbone_config": {"patch_size": 16, "image_size": 64, "pretrain_image_size": 64}},
    "textnet": {"hidden_sizes": [32, 32, 32, 64, 64]},
    "deimv2": {"encoder_in_channels": [16, 16, 32], "encode_proj_layers": [2], "decoder_in_channels": [32, 32, 32]},
    "pp_doclayout_v2": {
        "class_thresholds": [0.0] * 32,
        "class_order": [at % 20 for at in range(32)],
        "encoder_in_channels": [16, 16, 32],
        "encode_proj_layers": [2],
        "decoder_in_channels": [32, 32, 32],
    },
    "pp_doclayout_v3": {
        "x4_feat_dim": 16,
        "encoder_in_channels": [16, 16, 32],
        "encode_proj_layers": [2],
        "decoder_in_channels": [32, 32, 32],
    },
    "pp_doclayout_v4": {
        "encoder_in_channels": [16, 16, 32],
        "encode_proj_layers": [2],
        "decoder_in_channels": [32, 32, 32],
    },
    "rt_detr": {"encode_proj_layers": [2], "decoder_in_channels": [32, 32, 32]},
    "rt_detr_v2": {"encode_proj_layers": [2], "decoder_in_channels": [32, 32, 32]},
    "swin": {"window_size": 2},
    "swinv2": {"window_size": 2},
    "donut-swin": {"window_size": 2},
    "maskformer-swin": {"window_size": 2},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 16, 16]},
    "lw_detr_vit": {
        "num_windows": 4,
        "image_size": 64,
        "num_hidden_layers": 2,
        "window_block_indices": [0],
        "out_indices": [1, 2],
    },
    "align_vision_model": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.5,
        "hidden_dim": 64,
        "in_channels": [32, 16, 24, 40, 80, 112, 192],
        "out_channels": [16, 24, 40, 80, 112, 192, 320],
    },
    "upernet": {"auxiliary_in_channels": 64, "backbone_config": {"+out_indices": [1, 2, 3, 4]}},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [1, 3, 4], "depth": [1, 2, 3], "patch_sizes": [7, 3, 3]},
    "swin2sr": {"embed_dim": 24, "depths": [1, 1], "num_heads": [3, 3]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "detr": _RESNET,
    "conditional_detr": _RESNET,
    "deformable_detr": _RESNET,
    "dab-detr": _RESNET,
    "table-transformer": _RESNET,
    "grounding-dino": {"num_queries": 8},
    "omdet-turbo": {
        "use_timm_backbone": False,
        "apply_layernorm_after_vision_backbone": False,
        "vision_features_channels": [32, 32, 32],
        "backbone_config:model": ("swin", {"+out_indices": [1, 2, 3]}),
    },
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "blocks_per_stage": [1, 2, 1, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "global_attention_blocks": [2],
        "image_size": [64, 64],
        "window_positional_embedding_background_size": [2, 2],
    },
    "pvt": {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4]},
    "poolformer": {"hidden_sizes": [8, 16, 24, 32]},
    "radio": {"max_img_size": 64},
    "muse_glimmer_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "inkling2_vision": {"posemb_grid_size": 8},
    "seggpt": {"image_size": [64, 32]},
    "oneformer": {"task_seq_len": 8},
    # timm's smallest architectures; each is made with a size of its own.
    "timm_wrapper": {"architecture": "test_vit"},
    "timm_backbone": {"backbone": "test_resnet"},
    "gemma3n_vision": {"architecture": "test_efficientnet", "hidden_size": 256},
    "fast_vlm": {"vision_config": {"architecture": "test_efficientnet", "+hidden_size": 256, "model_args": {}}},
    "perception_lm": {"vision_config": {"architecture": "test_vit", "model_args": {"embed_dim": 64}}},
    "pe_video_encoder": _TOWER,
    "pe_audio_video_encoder": {"video_config": _TOWER},
    "edgetam_vision_model": {
        "backbone_config": {
            "architecture": "test_resnet",
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        },
        "backbone_channel_list": [192, 48, 32, 32],
        "backbone_feature_sizes": [[80, 80], [40, 40], [20, 20]],
    },
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "lw_detr": {"projector_scale_factors": [2.0, 0.5]},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0], "merge_padding_value": 1},
    "chmv2": {"backbone_config": _FOUR | {"+return_class_token": True}, "post_process_channels": [8, 16, 32, 64]},
    "efficientloftr": {
        "stage_num_blocks": [1, 1, 1, 1],
        "out_features": [16, 16, 16, 32],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 2.0},
    },
    "sapiens2": {"head_config": {"upsample_out_channels": [16], "conv_out_channels": [16]}},
    "pp_ocrv5_server_det": _TEXT_FINDER,
    "pp_ocrv6_medium_det": _TEXT_FINDER | {"backbone_config": _LCNET_V4},
    "pp_ocrv6_small_det": {"backbone_config": _LCNET_V4, "layer_list_out_channels": [16, 16, 32, 32]},
    "pp_ocrv5_server_rec": {"backbone_config": {"stage_downsample": [True, True, True, True]}},
    "uvdoc_backbone": {
        "resnet_head": [[3, 16], [16, 16]],
        "resnet_configs": [
            [[16, 16, 1, False]],
            [[16, 16, 1, True], [16, 16, 3, False]],
            [[16, 32, 1, True], [32, 32, 3, False]],
        ],
        "stage_configs": [[[32, 1]], [[32, 2]], *[[[32, 3], [32, 2]]] * 4],
        "+out_indices": [1, 2, 3, 4, 5, 6],
    },
    "uvdoc": {"bridge_connector": [32, 32], "out_point_positions2D": [[32, 16], [16, 2]]},
    "edgetam": {"prompt_encoder_config": {"image_size": 160, "patch_size": 8}},
}
