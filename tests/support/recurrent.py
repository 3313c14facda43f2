"""The smallest seeded model of every family whose layers loop over the sequence, beside those of ``families``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

SMALL = {"hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
TEXT = {**SMALL, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
SCAN = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}

_BUILD: dict[str, Callable[[int], Any]] = {
    "qwen3_next": lambda n: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(
        **TEXT, **DELTA, num_hidden_layers=n, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16)),
    "qwen3_5": lambda n: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(
        **TEXT, **DELTA, num_hidden_layers=n, head_dim=8)),
    "olmo_hybrid": lambda n: hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(
        **TEXT, **DELTA | {"linear_num_key_heads": 4}, num_hidden_layers=n)),
    "kimi_linear": lambda n: hf.KimiLinearForCausalLM(hf.KimiLinearConfig(
        **TEXT | {"num_key_value_heads": 4}, num_hidden_layers=n, kv_lora_rank=16, q_lora_rank=None,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, linear_num_heads=4, linear_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)),
    "falcon_mamba": lambda n: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(
        hidden_size=32, vocab_size=64, num_hidden_layers=n, state_size=8)),
    "jamba": lambda n: hf.JambaForCausalLM(hf.JambaConfig(
        **TEXT, **SCAN, num_hidden_layers=n, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1)),
    "zamba": lambda n: hf.ZambaForCausalLM(hf.ZambaConfig(
        **TEXT, **SCAN, num_hidden_layers=2 * n, layer_types=["mamba", "hybrid"] * n, n_mamba_heads=2)),
    "bamba": lambda n: hf.BambaForCausalLM(hf.BambaConfig(
        **TEXT, **SSD, num_hidden_layers=n, attn_layer_indices=[1])),
    "falcon_h1": lambda n: hf.FalconH1ForCausalLM(hf.FalconH1Config(
        **TEXT, **SSD, mamba_d_ssm=64, num_hidden_layers=n, head_dim=8)),
    "nemotron_h": lambda n: hf.NemotronHForCausalLM(hf.NemotronHConfig(
        **TEXT, layers_block_type=(["mamba", "attention", "mlp"] * n)[:n], mamba_num_heads=8, mamba_head_dim=8,
        n_groups=2, ssm_state_size=8, chunk_size=8, head_dim=8)),
    "minimax": lambda n: hf.MiniMaxForCausalLM(hf.MiniMaxConfig(
        **TEXT, num_hidden_layers=n, head_dim=8, num_local_experts=4, block_size=8)),
    "rwkv": lambda n: hf.RwkvForCausalLM(hf.RwkvConfig(
        hidden_size=32, vocab_size=64, num_hidden_layers=n, intermediate_size=64, context_length=512)),
    "mamba": lambda n: hf.MambaForCausalLM(hf.MambaConfig(
        hidden_size=32, num_hidden_layers=n, vocab_size=64, state_size=8)),
    "mamba2": lambda n: hf.Mamba2ForCausalLM(hf.Mamba2Config(
        hidden_size=32, num_hidden_layers=n, vocab_size=64, state_size=8, num_heads=8, head_dim=8, n_groups=2,
        chunk_size=8)),
}  # fmt: skip

RECURRENT = sorted(_BUILD)


def recurrent(family: str, layers: int = 2, seed: int = 0) -> Any:
    """A seeded model in float32 and eval mode."""
    torch.manual_seed(seed)
    return _BUILD[family](layers).eval()
