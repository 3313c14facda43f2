"""Tiny models quantized by the formats that models are published in, each by its library or by its definition."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.families import save
from torch import Tensor

Tensors = dict[str, Tensor]
GROUP = 16


def dense_folder(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A seeded model's folder, in ``dtype``; a model that lies there is taken as it is."""
    if (folder / "config.json").exists():
        return folder
    save(family, folder)
    store(folder, {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()})
    change_config(folder, dtype=str(dtype).removeprefix("torch."))
    return folder


def tensors_of(folder: Path) -> Tensors:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def store(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.endswith("proj.weight") and tensor.dim() == 2


def rewrite(folder: Path, make: Callable[[str, Tensor], Tensors], quantization: Mapping[str, Any] | None) -> Path:
    """Every linear weight of ``folder`` in the place of what ``make`` gives for it, and a config that says so."""
    out: Tensors = {}
    for name, tensor in tensors_of(folder).items():
        out |= make(name, tensor.float()) if is_linear(name, tensor) else {name: tensor}
    store(folder, out)
    change_config(folder, quantization_config=quantization)
    return folder


def block_fp8(
    folder: Path, block: int = GROUP, family: str = "llama", scale_dtype: torch.dtype = torch.float32
) -> Path:
    def make(name: str, weight: Tensor) -> Tensors:
        rows, columns = (-(-n // block) for n in weight.shape)
        padded = torch.zeros(rows * block, columns * block)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        blocks = padded.reshape(rows, block, columns, block)
        scale = (blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448).to(scale_dtype)
        quantized = (blocks / scale.float()[:, None, :, None]).reshape(padded.shape)
        quantized = quantized[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
        return {name: quantized, f"{name}_scale_inv": scale}

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block] * 2}
    return rewrite(dense_folder(folder, family), make, config)


def modelopt_fp8(folder: Path, said: bool = True) -> Path:
    def make(name: str, weight: Tensor) -> Tensors:
        scale = (weight.abs().max() / 448).to(torch.float32)
        return {
            name: (weight / scale).to(torch.float8_e4m3fn),
            f"{name}_scale": scale,
            f"{name.removesuffix('weight')}input_scale": torch.tensor(0.5),
        }

    rewrite(dense_folder(folder), make, None)
    if said:
        (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    return folder


def mxfp4(folder: Path) -> Path:
    """gpt-oss with random blocks: every byte is a pair of numbers."""
    generator = torch.Generator().manual_seed(0)
    out: Tensors = {}
    for name, tensor in tensors_of(dense_folder(folder, "gpt_oss")).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            out[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            out[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
        else:
            out[name] = tensor
    store(folder, out)
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def compressed(folder: Path, form: str, family: str = "llama", **weights: Any) -> Path:
    """By compressed-tensors' own compressor of the format ``form``; ``weights``: its arguments."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)

    def make(name: str, weight: Tensor) -> Tensors:
        groups = weight.shape[1] // args.group_size if args.group_size else 1
        grouped = weight.reshape(weight.shape[0], groups, -1)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        if args.type == "float":
            scale, zero = torch.maximum(-low, high) / 448, None
        elif args.symmetric:
            scale, zero = torch.maximum(-low, high) / (2 ** (args.num_bits - 1) - 1), None
        else:
            scale = (high - low) / (2**args.num_bits - 1)
            zero = (-(2 ** (args.num_bits - 1)) - low / scale).round().to(torch.int8)
        if args.strategy == "tensor":
            scale = scale.max().reshape(1)
        state = {"weight": weight.bfloat16(), "weight_scale": scale.to(torch.bfloat16)}
        made = compressor.compress(state | ({} if zero is None else {"weight_zero_point": zero}), scheme)
        return {f"{name.removesuffix('weight')}{key}": value for key, value in made.items()}

    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    return rewrite(dense_folder(folder, family), make, config)


def pruned_24(weight: Tensor) -> Tensor:
    """The two largest of every four inputs."""
    groups = weight.reshape(-1, 4)
    return groups.masked_fill(groups.abs().argsort(1).argsort(1) < 2, 0).view_as(weight)


def without_zeros(weight: Tensor, *, pairs: bool) -> Tensors:
    """The parts of one weight, value by value: of 2:4, or of a bitmask with the starts of its rows."""
    rows, columns = weight.shape
    mask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    values, starts = [], []
    numbers = weight.float().tolist()
    for row in range(rows):
        starts.append(len(values))
        for first in range(0, columns, 4):
            group = range(first, min(first + 4, columns))
            kept = [c for c in group if numbers[row][c] != 0]
            # Groups of fewer than two are filled up with zeros of their own, the last ones first.
            kept += [c for c in reversed(group) if c not in kept][: 2 - len(kept)] if pairs else []
            for column in sorted(kept):
                mask[row, column // 8] |= 1 << column % 8
                values.append((row, column))
    index = torch.tensor(values).reshape(-1, 2).unbind(1)
    raw = weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight
    found = raw[index].view(weight.dtype)
    if pairs:
        return {
            "compressed": found.view(rows, columns // 2),
            "bitmask": mask,
            "shape": torch.tensor([[rows], [columns]]),
        }
    return {
        "compressed": found,
        "bitmask": mask,
        "shape": torch.tensor([rows, columns]),
        "row_offsets": torch.tensor(starts),
    }


def sparse(folder: Path, form: str, dtype: torch.dtype = torch.bfloat16, quantized: bool = False) -> Path:
    """Pruned to half zeros and stored without them, by the definition of ``sparse-24-bitmask`` or ``sparse-bitmask``;
    ``quantized``: in float8, a scale for each output neuron beside them."""
    pairs = form == "sparse-24-bitmask"

    def make(name: str, weight: Tensor) -> Tensors:
        base = name.removesuffix("weight")
        pruned = pruned_24(weight) if pairs else weight.masked_fill(weight.abs() < weight.abs().median(), 0)
        if quantized:
            scale = pruned.abs().amax(1, keepdim=True) / 448
            pruned = (pruned / scale).to(torch.float8_e4m3fn)
            extra = {f"{name}_scale": scale.to(dtype)}
        else:
            pruned, extra = pruned.to(dtype), {}
        return {f"{base}{key}": part for key, part in without_zeros(pruned, pairs=pairs).items()} | extra

    args = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if quantized else "dense",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}} if quantized else {},
        "sparsity_config": {
            "format": form,
            "sparsity_structure": "2:4" if pairs else "unstructured",
            "targets": ["Linear"],
        },
    }
    return rewrite(dense_folder(folder, dtype=dtype), make, config)


def packed_int32(numbers: Tensor, bits: int, axis: int, places: list[int] | None = None) -> Tensor:
    """Whole numbers [a, b] packed along ``axis`` into int32, number ``n`` of a word at place ``places[n]`` of it."""
    each = 32 // bits
    moved = np.moveaxis(numbers.numpy().astype(np.uint32), axis, -1)
    words = moved.reshape(*moved.shape[:-1], -1, each)
    out = np.zeros(words.shape[:-1], np.uint32)
    for number in range(each):
        out |= words[..., number] << np.uint32(bits * (places or range(each))[number])
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(out, -1, axis)).view(np.int32))


def gptq(folder: Path, bits: int = 4, form: str | None = None, desc_act: bool = False, said: bool = True) -> Path:
    generator = torch.Generator().manual_seed(0)

    def make(name: str, weight: Tensor) -> Tensors:
        outputs, inputs = weight.shape
        index = torch.arange(inputs) // GROUP
        if desc_act:
            index = index[torch.randperm(inputs, generator=generator)]
        numbers = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 2**bits, (inputs // GROUP, outputs), generator=generator)
        scales = (torch.rand(inputs // GROUP, outputs, generator=generator) * 0.02).to(torch.float16)
        stored = zeros if form == "gptq_v2" else (zeros - 1) % 2**bits
        base = name.removesuffix("weight")
        return {
            f"{base}qweight": packed_int32(numbers, bits, 0),
            f"{base}qzeros": packed_int32(stored, bits, 1),
            f"{base}scales": scales,
            f"{base}g_idx": index.to(torch.int32),
        }

    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": desc_act, "sym": False}
    config |= {"checkpoint_format": form} if form else {}
    rewrite(dense_folder(folder, dtype=torch.float16), make, config if said else None)
    if not said:
        (folder / "quantize_config.json").write_text(json.dumps(config))
    return folder


def awq(folder: Path, said: bool = True) -> Path:
    generator = torch.Generator().manual_seed(0)
    # Column 0 of eight is the first number of a word, column 1 the fifth, …
    places = [0, 4, 1, 5, 2, 6, 3, 7]

    def make(name: str, weight: Tensor) -> Tensors:
        outputs, inputs = weight.shape
        numbers = torch.randint(0, 16, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 16, (inputs // GROUP, outputs), generator=generator)
        base = name.removesuffix("weight")
        return {
            f"{base}qweight": packed_int32(numbers, 4, 1, places),
            f"{base}qzeros": packed_int32(zeros, 4, 1, places),
            f"{base}scales": (torch.rand(inputs // GROUP, outputs, generator=generator) * 0.02).to(torch.float16),
        }

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    rewrite(dense_folder(folder, dtype=torch.float16), make, config if said else None)
    if not said:
        old = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
        (folder / "quant_config.json").write_text(json.dumps(old))
    return folder


def bitsandbytes(folder: Path, kind: str = "nf4", double: bool = True) -> Path:
    from bitsandbytes import functional

    def make(name: str, weight: Tensor) -> Tensors:
        if kind == "int8":
            scale = weight.abs().amax(1)
            quantized = (weight / scale[:, None] * 127).round().to(torch.int8)
            base = name.removesuffix("weight")
            return {name: quantized, f"{base}SCB": scale, f"{base}weight_format": torch.tensor(0, dtype=torch.uint8)}
        data, state = functional.quantize_4bit(
            weight.bfloat16(), quant_type=kind, compress_statistics=double, blocksize=64
        )
        return {name: data} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    config: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": kind == "int8",
        "load_in_4bit": kind != "int8",
    }
    if kind != "int8":
        config |= {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
        config |= {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}
    return rewrite(dense_folder(folder), make, config)


# ggml's names of a block's tensors.
GGML = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


def gguf(
    path: Path,
    family: str = "llama",
    kind: str = "Q8_0",
    tokens: bool = True,
    more: Tensors | None = None,
    model: Any = None,
) -> Path:
    """A GGUF file as llama.cpp's converter writes one: ggml's names, llama's q and k with their rows in pairs."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from support.families import build

    model = model or build(family)
    config, architecture = model.config, _ARCHITECTURES[family]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if family != "llama":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if tokens:
        words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(config.vocab_size - 3))]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(words)
        writer.add_token_scores([0.0] * len(words))
        writer.add_token_types([2, 3, 3, *([6] * (len(words) - 3))])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for name, tensor in [*_ggml_tensors(model, family), *(more or {}).items()]:
        data = tensor.float().numpy()
        if tensor.dim() == 1 or "inp" in name:
            writer.add_tensor(name, data)
        else:
            form = GGMLQuantizationType[kind if data.shape[-1] % 32 == 0 else "F16"]
            blocks = _k_blocks(data.shape, form) if "_K" in kind else quants.quantize(data, form)
            writer.add_tensor(name, blocks, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _k_blocks(shape: tuple[int, ...], form: Any) -> np.ndarray[Any, Any]:
    """Random blocks of a kind that gguf-py makes dense and does not make: each number but its scales is any."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[form]
    drawn = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(form.name, (0, 2))
    for place in places:
        drawn[..., place : place + 2] = scale
    return drawn.reshape(*shape[:-1], -1)


def _ggml_tensors(model: Any, family: str) -> list[tuple[str, Tensor]]:
    out = []
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            known = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            out.append((f"{known[name.removesuffix('.weight')]}.weight", tensor))
            continue
        _, _, number, *rest = name.removesuffix(".weight").split(".")
        inner = ".".join(rest)
        parts = {inner: tensor}
        if inner == "mlp.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            parts = {"mlp.experts.gate_proj": gate, "mlp.experts.up_proj": up}
        for part, value in parts.items():
            config = model.config
            both = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            heads = both.get(part) if family == "llama" else None
            if heads is not None:
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            out.append((f"blk.{number}.{GGML[part]}.weight", value))
    return out
