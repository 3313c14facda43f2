"""Gradients go through packed weights to what lies before them, or are refused; none is lost or made up."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sparsify
from sparsify.backends.packed.loaded.linear import PackedLinear
from sparsify.backends.packed.loaded.modules import FastLinear, become
from sparsify.errors import BackendError
from sparsify.runtime.cpu.unpacking import unpacked

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 640}
SIZES |= {"vocab_size": 64, "num_key_value_heads": 2}
WAYS = {
    "2:4": ("magnitude:2:4", "packed:choice=smallest"),
    "2:4 int4": ("magnitude:2:4", "packed:choice=smallest,values=int4,activations=float"),
    "bitmask": ("magnitude:60%", "packed:choice=smallest"),
    "bitmask int8": ("magnitude:60%", "packed:choice=smallest,values=int8,activations=float"),
    "dense int8": ("", "packed:choice=smallest,values=int8,activations=float"),
}


def packed_model(way: str, root: Path, family: str = "Llama") -> Any:
    torch.manual_seed(0)
    own = {"num_local_experts": 4} if family == "Mixtral" else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **own)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what goes past the layers is not all
    model.save_pretrained(root / "dense")
    spec, to = WAYS[way]
    sparsify.compile(root / "dense", [spec] if spec else [], output=root / "packed", to=to)
    return transformers.AutoModelForCausalLM.from_pretrained(root / "packed").eval()


def gradient(model: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    model(inputs_embeds=x).logits.pow(2).mean().backward()
    assert x.grad is not None
    return x.grad


def near(got: Tensor, want: Tensor) -> bool:
    return float((got - want).norm()) < 0.02 * float(want.norm())


@pytest.mark.parametrize("way", WAYS)
def test_inputs_have_the_gradient_of_the_dense_model(way: str, tmp_path: Path) -> None:
    """One token, some, and as many as unpacked panels serve."""
    packed = packed_model(way, tmp_path)
    assert any(isinstance(m, PackedLinear) for m in packed.modules())
    inputs = [torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens)) for tokens in (1, 9, 90)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [gradient(packed, x) for x in inputs]
    dense = packed.dequantize()
    assert all(near(got, gradient(dense, x)) for got, x in zip(found, inputs, strict=True))


@pytest.mark.parametrize("way", ["2:4", "bitmask int8"])
def test_experts_pass_gradients_on(way: str, tmp_path: Path) -> None:
    packed = packed_model(way, tmp_path, "Mixtral")
    x = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    got = gradient(packed, x)
    assert near(got, gradient(packed.dequantize(), x))


def test_every_layer_and_its_bias(tmp_path: Path) -> None:
    """What passes a block by hides what the block has lost."""
    packed = packed_model("2:4 int4", tmp_path)
    dense = {name: copy.deepcopy(m) for name, m in packed.named_modules() if isinstance(m, PackedLinear)}
    assert len(dense) == 14
    for layer in dense.values():
        layer.bias = nn.Parameter(torch.randn(layer.out_features))
        weight = unpacked(layer.packed())
        for tokens in (1, 5, 40):
            x = torch.randn(2, tokens, layer.in_features, requires_grad=True)
            target = torch.randn(2, tokens, layer.out_features)
            got = torch.autograd.grad((layer(x) * target).sum(), [x, layer.bias])
            want = torch.autograd.grad((nn.functional.linear(x, weight, layer.bias) * target).sum(), [x, layer.bias])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_packed_weights_themselves_are_not_trained(tmp_path: Path) -> None:
    packed = packed_model("2:4", tmp_path)
    layer = next(m for m in packed.modules() if isinstance(m, PackedLinear))
    layer.weight.requires_grad_(True)
    with pytest.raises(BackendError, match=r"own gradient .* dequantize"):
        layer(torch.randn(1, layer.in_features))
    with torch.no_grad():
        layer(torch.randn(1, layer.in_features))


def test_dense_layers_beside_them_are_trained(tmp_path: Path) -> None:
    packed = packed_model("2:4", tmp_path)
    head = packed.lm_head
    become(head, FastLinear)
    for tokens in (1, 4):
        x = torch.randn(1, tokens, 64, requires_grad=True)
        got = torch.autograd.grad(head(x).pow(2).sum(), [x, head.weight])
        want = torch.autograd.grad(nn.functional.linear(x, head.weight).pow(2).sum(), [x, head.weight])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiler_loses_none(tmp_path: Path) -> None:
    """torch's compilers know no gradient of the operators: their graphs end before them where one is asked for."""
    packed = packed_model("2:4", tmp_path)
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(9))
    want = gradient(packed, x)
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, x), want, rtol=1e-4, atol=1e-6)
