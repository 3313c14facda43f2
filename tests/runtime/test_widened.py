"""Products by way of float32 are the products of 16-bit numbers, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import sparsify
from sparsify.calibration import interpreter
from sparsify.frontend.source import open_source
from sparsify.ir.operators import GROUPED_PRODUCTS
from sparsify.quality.perplexity import perplexity
from sparsify.runtime.cpu import wide

aten = torch.ops.aten
SHORT = frozenset({torch.bfloat16, torch.float16})
OFFSETS = torch.tensor([3, 3, 10], dtype=torch.int32)


def at(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "linear": (aten.linear.default, (at(3, 5, 64), at(200, 64), at(200)), {}),
    "linear without a bias": (aten.linear.default, (at(5, 64), at(200, 64)), {}),
    "one output": (aten.linear.default, (at(5, 64), at(64)), {}),
    "mm": (aten.mm.default, (at(5, 64), at(64, 200)), {}),
    "addmm": (aten.addmm.default, (at(200), at(5, 64), at(64, 200)), {}),
    "addmm, scaled": (aten.addmm.default, (at(5, 200), at(5, 64), at(64, 200)), {"beta": 2, "alpha": 0.5}),
    "bmm": (aten.bmm.default, (at(4, 5, 6), at(4, 6, 7)), {}),
    "matmul": (aten.matmul.default, (at(4, 5, 6), at(6, 7)), {}),
    "einsum": (aten.einsum.default, ("bij,bjk->bik", [at(4, 5, 6), at(4, 6, 7)]), {}),
    "conv1d": (aten.conv1d.default, (at(2, 4, 9), at(8, 4, 3), at(8)), {}),
    "conv2d": (aten.conv2d.default, (at(2, 4, 9, 9), at(8, 4, 3, 3)), {"padding": [1, 1]}),
    "experts": (aten._grouped_mm.default, (at(10, 16), at(3, 16, 24), OFFSETS), {}),
}


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [cast(each, dtype) for each in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def way(target: Any) -> Callable[..., Any] | None:
    return wide.widened(target._overloadpacket.__name__, target)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_products(case: str, dtype: torch.dtype, pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:
        monkeypatch.setattr(wide, "_PIECE", 1)
    target, args, kwargs = CASES[case]
    short = tuple(cast(value, dtype) for value in args)
    run = way(target)
    assert run is not None
    found = run(*short, **kwargs)
    if case == "experts":
        ends = [0, *OFFSETS.tolist()]
        x, weight = short[0].double(), short[1].double()
        due = torch.cat([x[i:j] @ w for i, j, w in zip(ends, ends[1:], weight, strict=False)])
    else:
        due = target(*(cast(value, torch.float64) for value in short), **kwargs)
    assert found.dtype == dtype and found.shape == due.shape
    # One rounding to the dtype, and float32's sums before it.
    torch.testing.assert_close(found.double(), due, rtol=torch.finfo(dtype).eps * 0.6, atol=2e-5)


@pytest.mark.parametrize("case", ["linear", "mm", "conv1d", "experts"])
def test_derivatives(case: str) -> None:
    target, args, kwargs = CASES[case]
    short = [cast(value, torch.bfloat16) for value in args]
    exact = [cast(value, torch.float32) for value in short]
    leaves = [[value.requires_grad_() for value in each if value.is_floating_point()] for each in (short, exact)]
    run = way(target)
    assert run is not None
    found = torch.autograd.grad(run(*short, **kwargs).float().square().sum(), leaves[0])
    due = torch.autograd.grad(run(*exact, **kwargs).square().sum(), leaves[1])
    for one, other in zip(found, due, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.02 * float(other.abs().max()))


def test_what_is_no_product_is_left_alone() -> None:
    assert way(aten.relu.default) is None


def test_every_product_of_experts_is_known() -> None:
    """The kernels import nothing of the graph, which names them too."""
    assert all(wide.widened(name, torch.relu) is wide.grouped for name in GROUPED_PRODUCTS)


def test_which_dtypes_are_slow_is_asked_of_onednn() -> None:
    found, onednn = wide.slow_dtypes(), torch.ops.mkldnn
    assert (torch.bfloat16 in found) == (not onednn._is_mkldnn_bf16_supported())
    assert (torch.float16 in found) == (not onednn._is_mkldnn_fp16_supported())


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_key_value_heads=4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_bfloat16_is_computed_and_pruned_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.bfloat16).eval()
    ids = torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(1))
    judged: dict[bool, float] = {}
    masks: dict[bool, dict[str, Tensor]] = {}
    for slow in (False, True):
        monkeypatch.setattr(interpreter, "slow_dtypes", lambda slow=slow: SHORT if slow else frozenset())
        judged[slow] = perplexity(open_source(model), ids)
        result = sparsify.compile(model, "wanda:2:4", calibration=[ids])
        masks[slow] = {site.parameter: result.weight(site.parameter) != 0 for site in result.runs[0].sites}
    assert judged[True] == pytest.approx(judged[False], rel=5e-3)
    for parameter, kept in masks[False].items():
        assert float((masks[True][parameter] == kept).float().mean()) > 0.98, parameter


class TestEverywhere:
    """``wide_products``: what a thread multiplies meanwhile."""

    @pytest.fixture(autouse=True)
    def slow(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Both dtypes are slow; the names of what is widened."""
        seen: list[str] = []
        before = wide.widened

        def told(name: str, target: Any) -> Any:
            found = before(name, target)
            return found and (lambda *args, **kwargs: (seen.append(name), found(*args, **kwargs))[1])

        monkeypatch.setattr(wide, "slow_dtypes", lambda: SHORT)
        monkeypatch.setattr(wide, "widened", told)
        return seen

    @pytest.mark.parametrize("name", MODELS)
    def test_a_model_and_its_derivatives(self, name: str, slow: list[str]) -> None:
        torch.manual_seed(0)
        model = MODELS[name]().to(torch.bfloat16).eval()
        ids = torch.randint(64, (2, 12))

        def found() -> tuple[Tensor, dict[str, Tensor]]:
            model.zero_grad()
            result = model(input_ids=ids, labels=ids)
            result.loss.backward()
            return result.logits.detach().float(), {n: p.grad.clone().float() for n, p in model.named_parameters()}

        logits, gradients = found()
        assert not slow
        with wide.wide_products():
            others, theirs = found()
        assert slow, "the products were found"
        torch.testing.assert_close(others, logits, rtol=0.03, atol=0.02)
        for parameter, gradient in gradients.items():
            apart = float((theirs[parameter] - gradient).norm()) / float(gradient.norm().clamp(min=1e-6))
            assert apart < 0.05, parameter

    def test_what_else_is_multiplied_stays(self, slow: list[str]) -> None:
        x, y = at(4, 5), at(5, 6)
        with wide.wide_products():
            assert torch.equal(x @ y, torch.mm(x, y))
            with pytest.raises(RuntimeError, match="dtype"):
                torch.nn.functional.linear(x, at(6, 5).bfloat16())
            out = torch.empty(4, 6, dtype=torch.bfloat16)
            torch.mm(x.bfloat16(), y.bfloat16(), out=out)
        assert not slow
