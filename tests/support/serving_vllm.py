"""Models that servers are tested with: small ones whose weights are packed in several ways, and what they generate."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparsify.backends.packed.config import METHOD, format_of
from sparsify.backends.packed.format import pack_parameter
from sparsify.runtime.few_bits import Integers
from sparsify.runtime.layout import holds_24
from sparsify.runtime.words import Layout

PROMPTS = [[5, 9, 33, 7], [100, 200, 210], [17] * 6, [1, 2, 3, 4, 5, 6, 7, 8, 9], [50, 40, 30]]
# What vLLM asks of the machine before it loads anything: a share of its memory that is free, whatever the model needs.
SMALL = ("--gpu-memory-utilization", "0.3")
_SIZES = {
    "vocab_size": 250, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
# Of older families, which call the rest otherwise.
_FEW = {name: size for name, size in _SIZES.items() if name not in ("num_key_value_heads", "max_position_embeddings")}
_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, intermediate_size=320, attention_bias=True)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, intermediate_size=320, tie_word_embeddings=True)),
    "stablelm": lambda: hf.StableLmForCausalLM(
        hf.StableLmConfig(**_SIZES, intermediate_size=320, partial_rotary_factor=0.5)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SIZES, intermediate_size=320)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FEW, num_kv_heads=2, new_decoder_architecture=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_FEW, max_position_embeddings=128, n_inner=320)),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **_SIZES,
            head_dim=32,
            intermediate_size=128,
            intermediate_size_mlp=320,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
        )
    ),
    "minicpm3": lambda: hf.MiniCPM3ForCausalLM(
        hf.MiniCPM3Config(
            **(_SIZES | {"num_key_value_heads": 4}),
            intermediate_size=320,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_rope_head_dim=32,
            qk_nope_head_dim=32,
            v_head_dim=32,
        )
    ),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**_SIZES, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)
    ),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            **_SIZES,
            layer_types=["mamba", "attention"],
            intermediate_size=128,
            shared_intermediate_size=128,
            num_local_experts=4,
            num_experts_per_tok=2,
            mamba_n_heads=4,
            mamba_d_head=64,
            mamba_d_state=16,
            mamba_n_groups=1,
        )
    ),
    "afmoe": lambda: hf.AfmoeForCausalLM(
        hf.AfmoeConfig(
            **_SIZES,
            head_dim=32,
            intermediate_size=320,
            moe_intermediate_size=128,
            num_experts=4,
            num_experts_per_tok=2,
            num_shared_experts=1,
            num_dense_layers=1,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=64,
            score_func="sigmoid",
            route_norm=True,
            route_scale=1.0,
            n_group=1,
            topk_group=1,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**_FEW)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **_FEW,
            num_key_value_heads=4,
            intermediate_size=320,
            moe_intermediate_size=128,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            kv_lora_rank=512,
            q_lora_rank=64,
            qk_rope_head_dim=64,
            qk_nope_head_dim=32,
            v_head_dim=32,
            n_group=1,
            topk_group=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
        )
    ),
    # The router is another than that of published checkpoints, of which vLLM has none on CPUs.
    "minimax_m2": lambda: hf.MiniMaxM2ForCausalLM(
        hf.MiniMaxM2Config(
            **_SIZES,
            head_dim=32,
            rotary_dim=32,
            intermediate_size=128,
            num_local_experts=4,
            num_experts_per_tok=2,
            scoring_func="softmax",
            use_routing_bias=True,
        )
    ),
    "gemma3n": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **(_SIZES | {"num_hidden_layers": 4}),
            vocab_size_per_layer_input=250,
            hidden_size_per_layer_input=32,
            head_dim=32,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            intermediate_size=[320] * 4,
            activation_sparsity_pattern=[0.0] * 4,
            laurel_rank=32,
            sliding_window=64,
        )
    ),
    "zamba2": lambda: hf.Zamba2ForCausalLM(
        hf.Zamba2Config(
            **(_SIZES | {"num_key_value_heads": 4}),
            intermediate_size=320,
            layers_block_type=["linear_attention", "hybrid"],
            mamba_d_state=16,
            adapter_rank=64,
        )
    ),
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


# What of each model is pruned how, and how it is packed: layouts are mixed within fused layers, and with dense ones.
_MIXED = {
    "q_proj": two_of_four,
    "k_proj": half,
    "v_proj": dense,
    "gate": half,
    "up": two_of_four,
    "o_proj": two_of_four,
}
FOLDERS: dict[str, tuple[str, dict[str, Pruned], dict[str, Any]]] = {
    "mixed": ("llama", {**_MIXED, "down": half, "lm_head": two_of_four}, {}),
    "head as a bitmask": ("llama", {"lm_head": half}, {}),
    "tied": ("tied", {"proj": two_of_four}, {}),
    "int4": ("llama", {"proj": two_of_four, "lm_head": two_of_four}, {"bits": 4}),
    "int8": ("llama", {"q_proj": half, "k_proj": dense, "up": two_of_four}, {"bits": 8}),
    "rows in another order": ("falcon", {"query_key_value": two_of_four, "dense": half}, {}),
    "transposed": ("gpt2", {"c_attn": two_of_four, "c_fc": half, "c_proj": two_of_four}, {}),
    "transposed int4": ("gpt2", {"c_attn": two_of_four, "c_fc": half, "c_proj": two_of_four}, {"bits": 4}),
    "fused on disk": ("phi3", {"qkv": two_of_four, "gate_up": half, "down": two_of_four}, {}),
    "experts": ("qwen3_moe", {"gate_up": two_of_four, "experts.down": half, "proj": two_of_four}, {}),
    "one stack": ("qwen3_moe", {"experts.down": two_of_four}, {}),
    "experts of int4": ("qwen3_moe", {"experts": two_of_four}, {"bits": 4}),
    "turned for its rotary embedding": ("llama4", {"self_attn": two_of_four, "o_proj": half}, {}),
    "without a name": ("minicpm3", {"proj": two_of_four, "o_proj": half}, {}),
    "in a model that keeps no config": ("zamba2", {"proj": two_of_four, "adapter": half}, {}),
    "stacks of another name": (
        "granitemoe",
        # By the older and the newer names.
        {"input_linear": two_of_four, "output_linear": half, "gate_up": two_of_four, "experts.down": half},
        {},
    ),
    "fused as its loader says": ("stablelm", {**_MIXED, "lm_head": two_of_four}, {}),
    "stacks that a loop of its own splits": (
        "granitemoehybrid",
        {"moe.input_linear": two_of_four, "moe.output_linear": half, "shared_mlp": two_of_four},
        {},
    ),
    "renamed by its end": ("afmoe", {"router.gate": two_of_four, "proj": two_of_four}, {}),
    "stacks that stay its own": ("granitemoehybrid", {"shared_mlp": two_of_four}, {}),
    "other names": ("mixtral", {"gate_up": half, "experts.down": two_of_four, "proj": half}, {}),
}


def model(family: str, pruned: dict[str, Pruned], layer: int | None = None) -> Any:
    """A seeded model whose parameters are pruned by the first of ``pruned`` that their name holds.

    Args:
        layer: whose parameters alone are; None: all layers'.
    """
    torch.manual_seed(0)
    made = _MODELS[family]().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                # Norms and biases are all alike at first, which would hide that they are swapped.
                parameter.add_(torch.randn_like(parameter) * 0.1)
            how = next((how for part, how in pruned.items() if part in name), None)
            if how is not None and (layer is None or f"layers.{layer}." in name):
                parameter.copy_(how(parameter.t()).t() if _is_transposed(made, name) else how(parameter))
    return made


def _is_transposed(made: Any, name: str) -> bool:
    """Whether a parameter lies [in_features, out_features]."""
    return isinstance(made.get_submodule(name.rpartition(".")[0]), Conv1D)


def packed(made: Any, folder: Path, bits: int | None = None) -> Path:
    """A packed folder of ``made``: what has zeros is packed, as 2:4 where it is, under the names of its parameters.

    Args:
        bits: of the values, in groups of 64; None: all of their dtype.
    """
    sites, kept = {}, made.state_dict()
    # What the experts of DeepSeek-V3 are corrected by is no parameter.
    tensors = {name: buffer for name, buffer in made.named_buffers() if name in kept}
    for name, parameter in made.named_parameters():
        weight = parameter.detach()
        # An embedding has zeros for the token that pads.
        if weight.dim() < 2 or int(weight.count_nonzero()) > 0.6 * weight.numel():
            tensors[name] = weight
            continue
        transposed = _is_transposed(made, name)
        flat = weight.t().contiguous() if transposed else weight.reshape(-1, weight.shape[-1])
        layout: Layout = "packed24" if holds_24(flat) else "bitmask"
        matrices = flat if bits is None else _rounded(flat, bits)
        experts = weight.shape[0] if weight.dim() == 3 else None
        site, parts = pack_parameter(matrices, layout, experts=experts, transposed=transposed)
        sites[name] = site
        tensors |= {name + part: tensor for part, tensor in parts.items()}
    made.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [type(made).__name__]}
    entries = {name: site.as_dict() for name, site in sites.items()}
    own = {"quant_method": METHOD, "format": format_of(sites), "sites": entries}
    config["quantization_config"] = own if bits is None else own | {"activations": "float"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def _rounded(weight: Tensor, bits: int) -> Integers:
    groups = weight.unflatten(1, (-1, 64))
    half_range = 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1).clamp(min=1e-4) / half_range).half().to(weight.dtype)
    whole = (groups / scales.unsqueeze(-1)).round().clamp(-half_range, half_range).flatten(1)
    return Integers(whole.to(torch.int8), scales, bits, 64)


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


def expected(folder: Path) -> list[list[int]]:
    """What was written down of :func:`generated`."""
    found: list[list[int]] = json.loads((folder / "tokens.json").read_text())
    return found


def tokens_of(llm: Any, prompts: Sequence[Sequence[int]] = PROMPTS, tokens: int = 16, **more: Any) -> list[list[int]]:
    """What an engine of vLLM's generates."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [list(done.outputs[0].token_ids) for done in llm.generate(given, asked, use_tqdm=False, **more)]


@contextlib.contextmanager
def served(folder: Path, log: Path, *options: str, **environment: str) -> Iterator[Callable[[list[int]], list[int]]]:
    """vLLM's own server on ``folder``: what asks it for 16 tokens after a prompt.

    Args:
        log: where it writes what it says.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *options]
    words += ["--dtype", "float32", "--max-model-len", "64", "--skip-tokenizer-init", "--return-tokens-as-token-ids"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *words, *SMALL]
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | environment)
    try:
        _wait(port, server, log)

        def complete(prompt: list[int]) -> list[int]:
            body = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
            answer = _ask(port, "/v1/completions", body | {"return_token_ids": True, "detokenize": False})
            found: list[int] = answer["choices"][0]["token_ids"]
            return found

        yield complete
    finally:
        server.terminate()
        server.wait(timeout=60)


def _ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            _ask(port, "/health")
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
