"""Write a sharded Llama checkpoint of random bfloat16 weights, one tensor in memory at a time.

    python tools/make_checkpoint.py OUT [--size 13b | 70b | tiny] [--layers N] [--seed 0]

The folder has Llama-13B's (or another size's) names and shapes, so that memory and speed can be measured without a
download.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 1024},
    "1k": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
           "num_key_value_heads": 16, "vocab_size": 8192},
    "222m": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 8192},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
SHARD = 5_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="13b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=int, default=SHARD, help="bytes per file")
    args = parser.parse_args()
    total = make_checkpoint(args.out, args.size, layers=args.layers, seed=args.seed, shard=args.shard)
    print(f"{args.out}: {total / 1e9:.2f} GB")


def write_config(out: Path, size: str, layers: int | None = None) -> LlamaConfig:
    """Write config.json alone: enough to trace a model of any size."""
    shape = dict(SIZES[size])
    if layers:
        shape["num_hidden_layers"] = layers
    config = LlamaConfig(**shape, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    return config


def make_checkpoint(out: Path, size: str, *, layers: int | None = None, seed: int = 0, shard: int = SHARD) -> int:
    """Write the checkpoint and return the bytes of its tensors."""
    out.mkdir(parents=True)
    config = write_config(out, size, layers)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, shape in tensors(config):
        size_ = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + size_ > shard:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled, total = filled + size_, total + size_
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, content in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {name: file for name, _ in content}
        _write_shard(out / file, content, generator)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def tensors(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors."""
    wide, mlp, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = wide // config.num_attention_heads * config.num_key_value_heads
    yield "model.embed_tokens.weight", (vocabulary, wide)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        yield f"{at}.input_layernorm.weight", (wide,)
        yield f"{at}.self_attn.q_proj.weight", (wide, wide)
        yield f"{at}.self_attn.k_proj.weight", (kv, wide)
        yield f"{at}.self_attn.v_proj.weight", (kv, wide)
        yield f"{at}.self_attn.o_proj.weight", (wide, wide)
        yield f"{at}.post_attention_layernorm.weight", (wide,)
        yield f"{at}.mlp.gate_proj.weight", (mlp, wide)
        yield f"{at}.mlp.up_proj.weight", (mlp, wide)
        yield f"{at}.mlp.down_proj.weight", (wide, mlp)
    yield "model.norm.weight", (wide,)
    yield "lm_head.weight", (vocabulary, wide)


def _write_shard(path: Path, content: list[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> None:
    header, offset = {}, 0
    for name, shape in content:
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in content:
            if "norm" in name:
                value = torch.ones(shape, dtype=torch.bfloat16)
            else:
                value = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            file.write(value.view(torch.uint8).numpy().data)


if __name__ == "__main__":
    main()
