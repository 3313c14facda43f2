"""What a field of a config is, by its name, and how large it becomes."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 128
WIDTH, HEADS, HEAD, INNER, LAYERS, EXPERTS = 32, 4, 8, 64, 2, 4

# A size and the names that get it, as patterns: the first that fits. No value becomes larger than it was; "kv", "image"
# and "patch" depend on others of the config; None leaves it as it is.
_NAMES: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, r".*vocab_size.* .*n_words vocab_size_.*"),
    (
        64,
        r"(max_|n_|num_|)(source_|target_|text_|window_|)(position|positions|ctx|position_embeddings) "
        r"max_seq(uence)?_len(gth)? seq_length seq_len max_position_embeddings .*max_seqlen max_length n_positions",
    ),
    (16, r"max_source_positions"),
    (64, r".*max_position.* .*_max_len(gth)?"),
    (8, r"sliding_window.* attention_window .*local_attention.* window"),
    (
        LAYERS,
        r"(num|n)_(.*_)?(hidden_|)(layers?|blocks) (.*_)?(encoder|decoder)_layers layers depth n_layers? num_layers? "
        r".*_depth .*num_layers .*num_blocks .*n_layers?",
    ),
    (
        "kv",
        r"num_key_value_heads num_kv_heads n_head_kv .*num_key_value_heads n_kv_heads num_attention_groups "
        r".*num_kv_heads",
    ),
    (8, r"mamba_n_heads mamba_num_heads"),
    (
        HEADS,
        r"n_head (num|n)_(.*_)?heads? .*attention_heads .*num_heads .*_n_heads? attn_heads num_attn_heads",
    ),
    (
        HEAD,
        r".*head_dim head_size d_kv kv_channels .*head_size attention_head_size .*_head_width .*mamba_d_head d_head "
        r"dim_head .*rope_dim rotary_dim mamba_headdim",
    ),
    (16, r"q_lora_rank kv_lora_rank .*lora_rank .*_lora_.*rank.* .*lora_dim .*low_rank.*"),
    (
        32,
        r"(moe|expert|shared_expert|.*moe).*(intermediate_size|ffn_dim|hidden_dim|ffn_hidden_size) "
        r"ffn_hidden_size_moe",
    ),
    (
        INNER,
        r"(.*_)?intermediate_(size|dim|channels?) .*ffn_dim d_ff n_inner .*mlp_dim .*ffn_hidden_size "
        r".*feed_?forward.*(dim|size|channels) .*mlp_hidden_(size|dim) .*inner_dim dim_feedforward .*ff_dim "
        r"pooler_hidden .*mlp_size dff dim_ff d_inner .*linear_units class_expand feed_forward_size "
        r".*intermediate_size.* .*ffn_size",
    ),
    (
        2,
        r"num_experts_per_tok(en)? num_experts_per_token moe_topk top_?k moe_k .*experts_top_?k num_selected_experts "
        r"moe_top_?k topk expert_top_k moe_num_active_.* .*_topk",
    ),
    (1, r"n_shared_experts num_shared_experts .*num_shared_experts"),
    (
        EXPERTS,
        r"(num|n)_(.*_)?experts .*num_experts n_routed_experts num_local_experts .*num_experts.* moe_num_.*experts",
    ),
    (2, r"n_group num_expert_groups?"),
    (1, r"topk_group"),
    (
        1,
        r"first_k_dense_replace .*num_dense_layers moe_layer_start_index num_dense_layers n_dense_layers",
    ),
    (4, r"(time_step|dt)_rank"),
    (8, r".*state_size .*_d_state ssm_state_size d_state .*state_dim"),
    (8, r".*chunk_size .*chunk_length"),
    (8, r".*block_size"),
    (2, r"mamba_n_groups n_groups mamba_ngroups .*_n_groups .*ngroups"),
    ("image", r"image_size img_size .*_image_size input_size"),
    ("patch", r"patch_size .*_patch_size"),
    (32, r"crop_size"),
    (
        None,
        r"spatial_merge_size temporal_patch_size .*kernel.* .*stride.* num_channels in_channels in_chans .*_factor "
        r".*_ratio",
    ),
    (16, r".*num_mel_bins n_mels? num_mels .*mel_bins"),
    (64, r"codebook_size .*codebook_size num_embeddings .*num_embeddings num_vq_embeddings"),
    (VOCABULARY, r".*hash_.* num_hash_buckets .*num_buckets .*_labels"),
    (2, r"num_codebooks .*num_codebooks num_code_groups n_codebooks num_quantizers .*num_quantizers"),
    (
        4,
        r"num_queries num_query_tokens .*num_queries num_latents .*n_latents num_image_tokens num_register_tokens "
        r"num_learnable_queries .*query_length .*query_tokens mm_tokens_per_image image_seq_len(gth)? "
        r"vision_soft_tokens.*",
    ),
    (
        None,
        r"num_feature_levels num_labels num_classes sampling_rate sample_rate .*_sampling_rate stage_numb_of_layers "
        r".*temperature rotary_embedding_base",
    ),
    (WIDTH, r".*upsample_groups"),
    (
        WIDTH,
        r"(.*_)?hidden_size (.*_)?hidden_dim (.*_)?d_model (.*_)?n_embd (.*_)?dim (.*_)?embed_dim "
        r"(.*_)?embedding_size (.*_)?embedding_dim (.*_)?projection_dim (.*_)?projection_size (.*_)?output_dim "
        r"(.*_)?input_dim (.*_)?width (.*_)?emb_dim (.*_)?channels (.*_)?embed_size (.*_)?hidden_channels "
        r"(.*_)?out_channels .*_dims? (.*_)?latent_dim (.*_)?model_dim (.*_)?num_features (.*_)?hidden_size_.* "
        r"(.*_)?embeds_dim (.*_)?conv_channels (.*_)?lru_width (.*_)?d_latents (.*_)?feature_dim (.*_)?proj_dim "
        r"(.*_)?upsample_initial_channel (.*_)?output_size (.*_)?conv_dim (.*_)?features? "
        r"(.*_)?classifier_proj_size (.*_)?feature_size .*codebook_dim in_features out_features .*num_channels",
    ),
)
_RULES = tuple((re.compile("|".join(names.split())), size) for size, names in _NAMES)


def size_of(name: str) -> Any:
    """What the field ``name`` becomes; None where nothing is known of it."""
    return next((size for pattern, size in _RULES if pattern.fullmatch(name)), None)
