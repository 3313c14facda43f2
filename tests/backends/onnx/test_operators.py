"""Operators that a translation can lose: small numbers beside others, complex ones, masks of one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from sparsify.backends.onnx import export_onnx
from sparsify.backends.onnx.running.session import open_session
from sparsify.errors import BackendError


class Call(nn.Module):
    """A function as a module, with a weight for there to be one."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.full((1,), 2.0))

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(*given) * self.scale


def check(function: Callable[..., Tensor], folder: Path, *given: Tensor, opset: int = 23) -> ir.Graph:
    """Export it, dynamic in the first axis, and hold onnxruntime's answer against torch's."""
    module = Call(function)
    shapes = ({0: torch.export.Dim.DYNAMIC},) * len(given)
    program = torch.export.export(module, given, dynamic_shapes=(shapes,), strict=False)
    export_onnx(program, folder, opset=opset)
    session = open_session(folder / "model.onnx")
    feed = {i.name: value.numpy() for i, value in zip(session.get_inputs(), given, strict=True)}
    got = session.run(None, feed)[0]
    want = module(*given).detach().numpy()
    assert got.shape == want.shape and np.allclose(got, want, atol=1e-6), np.abs(got - want).max()
    return ir.load(folder / "model.onnx").graph


@pytest.mark.first(1)
@pytest.mark.parametrize("opset", [20, 23])
def test_what_is_nearly_zero_or_one_stays(opset: int, tmp_path: Path) -> None:
    """Helium's norm adds 1e-8, without which padding divides zero by zero."""

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)

    check(norm, tmp_path / "norm", torch.stack([torch.zeros(8), torch.randn(8) * 1e-4]), opset=opset)
    check(lambda x: (x * 1.000009 - x) * 1e5, tmp_path / "one", torch.ones(3, 4), opset=opset)
    graph = check(lambda x: (x + 0.0) * 1.0 - 0.0, tmp_path / "exact", torch.randn(3, 4), opset=opset)
    assert [node.op_type for node in graph] == ["Mul"]


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    """What is compared with torch would be compared with other numbers (DiffusionGemma's canvas)."""
    with pytest.raises(BackendError, match=r"draws random numbers when it runs \(RandomUniformLike\)"):
        check(lambda x: x + torch.rand_like(x), tmp_path / "drawn", torch.randn(3, 4))
    assert not (tmp_path / "drawn").exists()


def test_rotations_by_complex_numbers(tmp_path: Path) -> None:
    """As Llama 4 and DeepSeek V2 write them."""

    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turns = torch.polar(torch.ones_like(angles), angles) * 0.5
        return torch.view_as_real(pairs * turns[:, :, None, :]).flatten(3)

    check(rotate, tmp_path / "out", torch.randn(3, 5, 2, 8), torch.randn(3, 5, 4))
    back = check(
        lambda x: torch.view_as_real(torch.view_as_complex(x).unsqueeze(-1)), tmp_path / "end", torch.randn(3, 5, 2)
    )
    assert back.outputs[0].shape is not None and len(back.outputs[0].shape) == 4


def test_numbers_of_constants_alone_are_computed(tmp_path: Path) -> None:
    """Gemma 3n's sparsity of activations is a quantile of the normal distribution."""

    def sparse(x: Tensor) -> Tensor:
        return torch.relu(x - torch.erfinv(2 * torch.tensor(0.95) - 1) * x.std(-1, keepdim=True))

    check(sparse, tmp_path / "out", torch.randn(3, 16))


@pytest.mark.parametrize("opset", [20, 23])
def test_a_mask_of_one_row_for_all_queries(opset: int, tmp_path: Path) -> None:
    """LayoutLM's; the operator of ONNX wants a row for each."""

    def attend(q: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    mask = torch.zeros(3, 1, 1, 7)
    mask[0, ..., -3:] = -1e9
    check(attend, tmp_path / "out", torch.randn(3, 2, 7, 4), mask, opset=opset)


@pytest.mark.first(1)
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("pool", [nn.functional.max_pool2d, nn.functional.avg_pool2d])
def test_zeros_around_what_is_pooled_stay(pool: Callable[..., Tensor], opset: int, tmp_path: Path) -> None:
    """All numbers are negative: to a maximum the zeros of the padding are the greatest (BiT's stem)."""

    def stem(x: Tensor) -> Tensor:
        return pool(nn.functional.pad(x, (1, 1, 1, 1)), 3, 2)

    check(stem, tmp_path / "pool", -torch.rand(2, 3, 9, 9) - 1, opset=opset)
