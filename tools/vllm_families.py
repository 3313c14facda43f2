"""Which families a vLLM serves packed: a tiny model of each, pruned and packed, and its tokens beside transformers'.

    python tools/vllm_families.py [--vllm .venv-vllm/bin/python] [--only llama,mixtral] [--layout packed24|bitmask]

Every causal language model that both transformers and that vLLM know by one architecture is built with small sizes,
compiled by `magnitude:2:4` (or `magnitude:50%`, of which bitmasks are made) `--to packed`, and generated from by
transformers in float32. Then the vLLM of `--vllm`, a Python whose environment `make vllm` makes, serves the folder;
where its tokens are others, or where it ends, the dense checkpoint of the same weights is served too, which tells what
is ours from what is not. What vLLM serves in bfloat16 alone is held against its dense model: each packed token has to
be that model's best one, or as near to it as roundings are. Prints a Markdown table; what each says of a failure is in
it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
TOKENS = 8

# By the names that configs have for them. vLLM attends on CPUs with heads of 32 and more.
SIZES = {
    "vocab_size": 256, "hidden_size": 128, "n_embd": 128, "d_model": 128, "intermediate_size": 320, "n_inner": 320,
    "ffn_hidden_size": 320, "ffn_dim": 320, "word_embed_proj_dim": 128, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 32, "rotary_dim": 32, "max_position_embeddings": 256, "n_positions": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
    "moe_intermediate_size": 128, "expert_ffn_hidden_size": 128, "shared_expert_intermediate_size": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "qk_head_dim": 64, "state_size": 16, "mamba_d_state": 16, "ssm_state_size": 16, "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_num_heads": 4, "mamba_head_dim": 64, "mamba_n_groups": 1, "n_groups": 1, "mamba_d_ssm": 256,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 256, "sliding_window": 64,
    "shared_intermediate_size": 128,
}  # fmt: skip
# What the sizes above do not say rightly of one type, and what vLLM looks for in its config.json.
_LATENT = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
}
# Gated delta rules: vLLM's kernels of CPUs have no heads of fewer.
_HYBRID = {"num_hidden_layers": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
OWN: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "axk1": _LATENT | {"index_topk": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v32": _LATENT | {"index_topk": 64},
    "falcon": {"ffn_hidden_size": 512},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [320] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 32,
    },
    "gemma4_text": {"enable_moe_block": True},
    "glm4_moe": {"first_k_dense_replace": 1, "head_dim": 32},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT | {"index_topk": 64},
    "gptj": {"n_inner": 512},
    "hy_v3": {
        "first_k_dense_replace": 1,
        "expert_hidden_dim": 128,
        "route_norm": True,
        "num_shared_experts": 1,
        "qk_norm": True,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": _LATENT | {"layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 4},
    "laguna": {
        "num_attention_heads_per_layer": [4, 4],
        "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "conv_dim": 128,
        "conv_dim_out": 128,
        "block_dim": 128,
        "block_ff_dim": 320,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 320, "intermediate_size": 128},
    "longcat_flash": _LATENT
    | {"qk_head_dim": 96, "zero_expert_num": 2, "zero_expert_type": "identity"}
    | {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mamba2": {"num_heads": 4, "head_dim": 64, "expand": 2},
    "mimo_v2_flash": {
        "layernorm_epsilon": 1e-5,
        "rope_theta": 5_000_000.0,
        "partial_rotary_factor": 0.334,
        "hybrid_layer_pattern": [0, 0],
        "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_layer_freq": [0, 1],
    },
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "minicpm3": {"num_key_value_heads": 4},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _HYBRID
    | {"hc_count": 2, "hc_lowrank": 32, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32}
    | {"indexer_budget": 64, "indexer_compress_ratio": 4, "output_gate_type": "silu"},
    "sarvam_mla": _LATENT,
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_mem_blocks": 1,
        "head_dim": 64,
        "num_key_value_heads": 4,
    },
}
# What vLLM's CPUs compute in bfloat16 alone (`CPU GDN attention requires BF16`), and how far behind the best token of
# the dense model, in logits, a packed one may be there.
BFLOAT16 = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
NEAR = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm/bin/python")
    parser.add_argument("--only", help="types, with commas between them; all that both know")
    parser.add_argument("--layout", choices=("packed24", "bitmask"), default="packed24")
    parser.add_argument("--serve", type=Path, nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        return _serve(asked.serve)
    kinds = asked.only.split(",") if asked.only else _known(asked.vllm)
    print("| type | | what was said |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        made: list[Path] = []
        for kind in kinds:
            folder = Path(place) / kind
            try:
                _make(kind, folder, asked.layout)
            except Exception as error:
                _row(kind, "no tiny model", f"{type(error).__name__}: {error}")
                continue
            made.append(folder)
        for folder, told in _served(asked.vllm, made):
            _row(folder.name, *_verdict(folder, told))
    return 0


def _row(kind: str, how: str, said: str) -> None:
    words = " ".join(said.split()).replace("|", "/")
    print(f"| {kind} | {how} | {words[:300]} |", flush=True)


def _known(vllm: Path) -> list[str]:
    """The types whose architecture that vLLM has, in the order of their names; those of models that see and hear, of
    which transformers makes the language model of another type, are left out.
    """
    import transformers as hf
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ask = "from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS as m; print(' '.join(m))"
    done = subprocess.run([vllm, "-c", ask], capture_output=True, text=True, check=True)
    theirs = set(done.stdout.splitlines()[-1].split())
    both = {kind: name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in theirs}
    return sorted(kind for kind, name in both.items() if getattr(hf, name).config_class is hf.CONFIG_MAPPING[kind])


def _make(kind: str, folder: Path, layout: str) -> None:
    """The dense pruned checkpoint, the packed folder and the tokens of a tiny model."""
    import torch
    import transformers as hf
    from support.serving_vllm import generated
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import sparsify

    model_class = getattr(hf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    names = set(vars(hf.CONFIG_MAPPING[kind]())) | set(hf.CONFIG_MAPPING[kind].attribute_map)
    config = hf.CONFIG_MAPPING[kind](**{k: v for k, v in SIZES.items() if k in names} | OWN.get(kind, {}))
    torch.manual_seed(0)
    model = model_class(config).eval()
    if (size := sum(p.numel() for p in model.parameters())) > 20_000_000:
        raise ValueError(f"the sizes of this tool leave it {size:,} parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases are all alike at first, which would hide that they are swapped.
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "model")
    spec, options = ("magnitude:50%", "bitmask") if layout == "bitmask" else ("magnitude:2:4", "packed24")
    sparsify.compile(folder / "model", [spec], output=folder / "dense")
    packed = f"packed:layout={options},choice=smallest"
    sparsify.compile(folder / "model", [spec], output=folder / "packed", to=packed)
    (folder / "tokens.json").write_text(json.dumps(generated(folder / "dense", tokens=TOKENS)))


def _served(vllm: Path, folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What vLLM generated of each folder; a process that ends is started again for those after the one it ended at."""
    left = list(folders)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    while left:
        command = [str(vllm), "-W", "ignore", __file__, "--serve", *map(str, left)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
            assert running.stdout is not None
            for line in running.stdout:
                if line.startswith('{"folder"'):
                    yield left.pop(0), json.loads(line)
        if running.returncode and left:
            yield left.pop(0), {"packed": f"the process ended with {running.returncode}"}


def _serve(folders: Sequence[Path]) -> int:
    """In vLLM's own environment: a line of JSON for each folder."""
    for folder in folders:
        told: dict[str, Any] = {"folder": folder.name}
        want = json.loads((folder / "tokens.json").read_text())
        for form in ("packed", "dense"):
            told[form] = _generated(folder, form, told)
            if told[form] == want:
                break
        print(json.dumps(told), flush=True)
        if isinstance(told["packed"], str):  # what an engine that failed leaves would fail the next one
            break
    return 0


def _generated(folder: Path, form: str, told: dict[str, Any]) -> list[list[int]] | str:
    from support.serving_vllm import tokens_of
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    words: dict[str, Any] = {"dtype": "bfloat16" if folder.name in BFLOAT16 else "float32", "max_model_len": 64}
    words |= {"skip_tokenizer_init": True, "gpu_memory_utilization": 0.3, "distributed_executor_backend": "uni"}
    try:
        llm = LLM(model=str(folder / form), enforce_eager=True, **words)
        if form == "dense" and folder.name in BFLOAT16 and not isinstance(told["packed"], str):
            told["behind"] = _behind(llm, told["packed"])
        return tokens_of(llm, tokens=TOKENS)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        llm = None
        cleanup_dist_env_and_memory()


def _behind(llm: Any, tokens: list[list[int]]) -> float:
    """How far the worst of ``tokens``, which follow the prompts, is behind what the engine's model takes for best."""
    from support.serving_vllm import PROMPTS
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
    given = [{"prompt_token_ids": prompt + more} for prompt, more in zip(PROMPTS, tokens, strict=True)]
    worst = 0.0
    for done, more in zip(llm.generate(given, asked, use_tqdm=False), tokens, strict=True):
        for found, token in zip(done.prompt_logprobs[-len(more) :], more, strict=True):
            worst = max(worst, max(one.logprob for one in found.values()) - found[token].logprob)
    return worst


def _verdict(folder: Path, told: dict[str, Any]) -> tuple[str, str]:
    want, packed, dense = json.loads((folder / "tokens.json").read_text()), told["packed"], told.get("dense")
    if packed == want:
        return "packed, tokens equal", ""
    if isinstance(packed, str):
        if isinstance(dense, str):
            return "not served, dense neither", dense
        return "**refused packed**", packed
    if packed == dense:
        return "packed, tokens those of vLLM's dense model", "which are not transformers'"
    if told.get("behind", NEAR) < NEAR:
        said = f"or at most {told['behind']:.3f} behind them, of what it serves in bfloat16 alone"
        return "packed, tokens those of vLLM's dense model", said
    return "**other tokens**", f"dense {dense}, packed {packed}, for {want}"


if __name__ == "__main__":
    sys.exit(main())
