"""Each format dequantized: equal to transformers bit for bit, or to a slow reference by the format's definition."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import quantized
from support.quantized import Tensors, tensors_of
from torch import Tensor

from sparsify.frontend.source import open_source


def needs(package: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed (the extra quantized)")


_CT, _BNB = needs("compressed_tensors"), needs("bitsandbytes")
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
_FP8 = transformers.FineGrainedFP8Config(dequantize=True)
# What makes the model, and how transformers is told to read it dense.
BY_TRANSFORMERS: dict[str, Any] = {
    "fp8": (quantized.block_fp8, _FP8),
    "fp8 of experts that lie apart": (partial(quantized.block_fp8, family="deepseek_v3"), _FP8),
    "fp8 with scales in bfloat16": (partial(quantized.block_fp8, scale_dtype=torch.bfloat16), _FP8),
    "mxfp4": (quantized.mxfp4, transformers.Mxfp4Config(dequantize=True)),
    "int4": (partial(quantized.compressed, form="pack-quantized", symmetric=True, **_INT4), "ct"),
    "int4 with zero points": (partial(quantized.compressed, form="pack-quantized", symmetric=False, **_INT4), "ct"),
    "int4 of experts that lie apart": (
        partial(quantized.compressed, form="pack-quantized", family="qwen3_moe", symmetric=True, **_INT4),
        "ct",
    ),
    "int8": (partial(quantized.compressed, form="int-quantized", num_bits=8, type="int", strategy="channel"), "ct"),
    "float8": (
        partial(quantized.compressed, form="float-quantized", num_bits=8, type="float", strategy="channel"),
        "ct",
    ),
    "naive float8": (
        partial(quantized.compressed, form="naive-quantized", num_bits=8, type="float", strategy="tensor"),
        "ct",
    ),
    "nf4 with nested scales": (partial(quantized.bitsandbytes, kind="nf4", double=True), "bnb"),
    "nf4": (partial(quantized.bitsandbytes, kind="nf4", double=False), "bnb"),
    "fp4": (partial(quantized.bitsandbytes, kind="fp4"), "bnb"),
    "llm.int8": (partial(quantized.bitsandbytes, kind="int8"), "bnb"),
}
# As transformers 5.22 began to: tensor by tensor, in the dtype that was asked for.
_ONE_BY_ONE = hasattr(transformers.integrations.compressed_tensors, "CompressedTensorsDequantize")
_MARKS = {"ct": [_CT], "bnb": [_BNB]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("make", "how"),
    [pytest.param(*case, id=name, marks=_MARKS.get(str(case[1]), [])) for name, case in BY_TRANSFORMERS.items()],
)
def test_equals_transformers(make: Callable[[Path], Path], how: Any, dtype: str, tmp_path: Path) -> None:
    folder, to = make(tmp_path / "model"), getattr(torch, dtype)
    options = {} if how == "bnb" else {"quantization_config": how}
    if how == "ct":
        if not _ONE_BY_ONE and (dtype == "float32" or make.keywords["form"] == "int-quantized"):
            pytest.skip("this transformers rounds scales to bfloat16 first, and reads no int-quantized weights")
        options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=to, **options)
    if how == "bnb":
        reference = reference.dequantize(to)
    source = open_source(folder, dtype=dtype)
    want = reference.state_dict()
    assert source.weights.parameters()
    for name in source.weights.parameters():
        got = source.weights.read(name)
        assert got.shape == want[name].shape == source.weights.shape(name)
        assert got.dtype == source.weights.dtype(name) == to
        assert torch.equal(got, want[name].to(to)), name


def by_definition(folder: Path, dequantize: Callable[[Tensors, str], Tensor], end: str, dtype: torch.dtype) -> None:
    source, stored = open_source(folder, dtype=dtype), tensors_of(folder)
    linear = [name.removesuffix(end) for name in stored if name.endswith(end) and "proj" in name]
    assert len(linear) == 14
    for base in linear:
        assert torch.equal(source.weights.read(f"{base}weight"), dequantize(stored, base).to(dtype)), base
    # What is not quantized is what it was; of 16 bits it follows.
    assert torch.equal(source.weights.read("lm_head.weight"), stored["lm_head.weight"].to(dtype))


def one_by_one(stored: Tensors, base: str, bits: int, places: list[int], along: str, less: int) -> Tensor:
    """W[o, i] = s[g, o] (q[i, o] − z[g, o]), each number cut out of its word by itself."""
    words, zeros, scales = stored[f"{base}qweight"], stored[f"{base}qzeros"], stored[f"{base}scales"]
    each, most = 32 // bits, 2**bits
    inputs = len(words) * (each if along == "in" else 1)
    index = stored.get(f"{base}g_idx", torch.arange(inputs) // quantized.GROUP).tolist()
    words_, zeros_ = (words.long() % 2**32).tolist(), (zeros.long() % 2**32).tolist()
    out = torch.empty(scales.shape[1], inputs)
    for i in range(inputs):
        for o in range(scales.shape[1]):
            word, at = (words_[i // each][o], i % each) if along == "in" else (words_[i][o // each], places[o % each])
            number = (word >> (bits * at)) % most
            zero = ((zeros_[index[i]][o // each] >> (bits * places[o % each])) + less) % most
            out[o, i] = float(scales[index[i], o]) * (number - zero)
    return out


@pytest.mark.parametrize(
    ("bits", "form", "order"), [(4, None, False), (4, "gptq_v2", True), (8, "gptq", True), (2, None, False)]
)
def test_gptq_by_definition(bits: int, form: str | None, order: bool, tmp_path: Path) -> None:
    folder = quantized.gptq(tmp_path / "model", bits, form, order)
    less = 0 if form == "gptq_v2" else 1
    places = list(range(32 // bits))
    by_definition(folder, lambda s, base: one_by_one(s, base, bits, places, "in", less), "qweight", torch.float16)


@pytest.mark.parametrize("said", [True, False])
def test_awq_by_definition(said: bool, tmp_path: Path) -> None:
    folder = quantized.awq(tmp_path / "model", said)
    places = [0, 4, 1, 5, 2, 6, 3, 7]
    by_definition(folder, lambda s, base: one_by_one(s, base, 4, places, "out", 0), "qweight", torch.bfloat16)


def test_gptq_that_only_a_file_beside_names(tmp_path: Path) -> None:
    folder = quantized.gptq(tmp_path / "model", said=False)
    assert open_source(folder).quantization["method"] == "gptq"


@pytest.mark.parametrize("said", ["a file", "nothing", "fp8"])
def test_a_scale_a_tensor_by_definition(said: str, tmp_path: Path) -> None:
    folder = quantized.modelopt_fp8(tmp_path / "model", said == "a file")
    if said == "fp8":
        # As vLLM's own writer has it.
        quantized.change_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "static"})

    def dequantize(stored: Tensors, base: str) -> Tensor:
        return stored[f"{base}weight"].float() * stored[f"{base}weight_scale"]

    by_definition(folder, dequantize, "weight_scale", torch.bfloat16)


@pytest.mark.parametrize("block", [24, 40, 128])
def test_fp8_whose_last_block_is_not_whole(block: int, tmp_path: Path) -> None:
    folder = quantized.block_fp8(tmp_path / "model", block)

    def dequantize(stored: Tensors, base: str) -> Tensor:
        weight, scale = stored[f"{base}weight"].float(), stored[f"{base}weight_scale_inv"]
        for row in range(len(weight)):
            for column in range(weight.shape[1]):
                weight[row, column] *= scale[row // block, column // block]
        return weight

    by_definition(folder, dequantize, "weight_scale_inv", torch.bfloat16)


@_CT
def test_int4_in_the_order_of_activations(tmp_path: Path) -> None:
    folder = quantized.compressed(tmp_path / "model", form="pack-quantized", symmetric=True, **_INT4)
    plain = {n: open_source(folder).weights.read(n) for n in open_source(folder).weights.parameters()}
    stored, orders = tensors_of(folder), {}
    for name in [n for n in stored if n.endswith("weight_packed")]:
        base = name.removesuffix("weight_packed")
        inputs = plain[f"{base}weight"].shape[1]
        places = torch.randperm(inputs, generator=torch.Generator().manual_seed(0))
        orders[f"{base}weight"] = places
        # The same numbers, each column and its group at another place.
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

        numbers = unpack_from_int32(stored[name], 4, torch.Size(stored[f"{base}weight_shape"].tolist()))
        stored[name] = pack_to_int32(numbers[:, places], 4)
        stored[f"{base}weight_g_idx"] = (torch.arange(inputs) // 16)[places].to(torch.int32)
    quantized.store(folder, stored)
    weights = open_source(folder).weights
    for name, places in orders.items():
        assert torch.equal(weights.read(name), plain[name][:, places])
