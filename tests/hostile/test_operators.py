"""The operators called as nobody should: refused before a pointer moves; NaN wherever a dense product has it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from raw_calls import OPERATORS, mutated, sound_call
from support.matrices import DTYPES, pruned, pruned_24
from torch import Tensor, nn

from sparsify.errors import BackendError, SparsifyError
from sparsify.passes.lowering.lower_sparse import LowerSparse
from sparsify.runtime import ops
from sparsify.runtime.codes import row_starts
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.layout import Packed, pack
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import LAYOUTS, Layout

GOOD = pack(pruned_24(8, 64), "packed24")
MASK = pack(pruned_24(8, 64), "bitmask")
STARTS = row_starts(MASK.codes)
X = torch.randn(2, 64)
TWO, FULL = pack(pruned_24(16, 64), "packed24"), torch.randn(8, 64)


def placed(tensor: Tensor, at: int, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[at] = value
    return tensor


def stack(packed: Any) -> tuple[Tensor, Tensor]:
    return packed.values.view(2, 8, 32), packed.codes.view(2, 8, 8)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        # F8: a bias of another length, starts that point past the values, a mask that does not match its starts.
        *[(ops.linear_24, (X, GOOD.values, GOOD.codes, torch.zeros(n))) for n in (0, 1, 7, 9)],
        *[(ops.linear_bitmask, (X, MASK.values, MASK.codes, STARTS, torch.zeros(n))) for n in (0, 1, 7, 9)],
        *[(ops.linear_dense, (X[:1], FULL, torch.zeros(n))) for n in (0, 1, 7, 9)],
        *[
            (ops.linear_bitmask, (X, MASK.values, MASK.codes, placed(STARTS, at, value)))
            for at in (0, 3, 8)
            for value in (10**6, -1, -(2**63), 2**63 - 1, 1)
        ],
        (ops.linear_bitmask, (X, MASK.values, torch.full_like(MASK.codes, -1), STARTS)),
        (ops.linear_bitmask, (X, MASK.values, torch.zeros_like(MASK.codes), STARTS)),
        *[(ops.linear_bitmask, (torch.randn(n, 64), MASK.values[:-65], MASK.codes, STARTS)) for n in (1, 9, 65, 600)],
        # F17: two tokens whose numbers are as many as the weight has columns.
        (ops.linear_dense, (torch.randn(2, 64), torch.randn(64, 128))),
        (ops.linear_dense, (torch.tensor(1.0), torch.randn(8, 1))),
        # F24: ends of experts past the tokens, or descending.
        *[(ops.experts_24, (X, *stack(TWO), torch.tensor(ends))) for ends in ([1, 3], [2, 1], [-1, 2], [1, 2**40])],
        (ops.experts_24, (X, *stack(TWO), torch.tensor([2]))),
        (ops.experts_24, (X, *stack(TWO), torch.tensor([1.0, 2.0]))),
        # Codes that are no two ascending positions.
        (ops.linear_24, (X, GOOD.values, torch.zeros_like(GOOD.codes))),
        (ops.experts_24, (X, stack(TWO)[0], torch.full((2, 8, 8), 255, dtype=torch.uint8), torch.tensor([1, 2]))),
        (ops.linear_24, (X, None, GOOD.codes)),
        (ops.linear_24, (X.to_sparse(), GOOD.values, GOOD.codes)),
        (ops.linear_24, (X, GOOD.values.to("meta"), GOOD.codes)),
    ],
)
def test_what_is_no_product_is_refused(call: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(BackendError):
        call(*arguments)


@pytest.mark.parametrize("inside", [True, False])
def test_tensors_made_in_inference_mode_serve_again_and_again(inside: bool) -> None:
    with torch.inference_mode():
        values, codes = GOOD.values.clone(), GOOD.codes.clone()
    exact = ops.linear_24(X, GOOD.values, GOOD.codes)
    for _ in range(3):
        with torch.inference_mode(inside):
            assert torch.equal(ops.linear_24(X, values, codes), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_of_no_rows_there_is_nothing(layout: Layout, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = GOOD if layout == "packed24" else MASK
        values, codes, starts = matrix.values[:0], matrix.codes[:0], torch.zeros(1, dtype=torch.int64)
        if layout == "bitmask":
            values = MASK.values[-64:]
        none = Packed(layout, (0, 64), values, codes)
        assert unpacked(none, starts).shape == (0, 64)
        for tokens in (1, 9, 65, 100):
            x = torch.randn(tokens, 64)
            y = (
                ops.linear_24(x, values, codes)
                if layout == "packed24"
                else ops.linear_bitmask(x, values, codes, starts)
            )
            assert y.shape == (tokens, 0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.first(4)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_random_calls_are_products_or_are_refused(operator: Any) -> None:
    """A few of what `tools/fuzz_ops.py` does under sanitizers."""
    draw, made = Random(3), 0
    while made < 60:
        call = mutated(draw, sound_call(draw))
        if call.operator is not operator:
            continue
        made += 1
        try:
            call.operator(*call.arguments)
        except SparsifyError:
            continue
        except (RuntimeError, NotImplementedError) as error:
            # Of tensors that torch's dispatcher refuses before we are asked.
            assert "sparsify" not in str(error).partition("\n")[0] or "meta" in str(error).lower(), call


def isas() -> list[str]:
    found = native.library()
    return list(native.ISAS[: (found.best_isa if found is not None else 0) + 1])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_come_through(
    isa: str, layout: Layout, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F18: zero times infinity is NaN, also where the weight that it meets was pruned, for every number of tokens."""
    monkeypatch.setattr(native, "isa", lambda: native.ISAS.index(isa))
    weight = pruned_24(33, 200, dtype) if layout == "packed24" else pruned(33, 200, 0.7, dtype)
    packed = PackedWeight.of(weight, layout)
    for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 64, 65, 70):
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(tokens, 200).to(dtype)
            x[tokens // 2, 77] = bad
            got, exact = packed.linear(x), nn.functional.linear(x.double(), weight.double())
            assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf()), (tokens, bad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_graph_with_broken_tensors(layout: Layout, tmp_path: Path) -> None:
    """A .pt2 is data too: its tensors are looked at when it runs, like those of any other caller."""
    net = nn.Sequential(nn.Linear(64, 32, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(pruned_24(32, 64) if layout == "packed24" else pruned(32, 64, 0.5))
        graph = torch.export.export(net, (X,)).module()
        lowered = LowerSparse(choice="smallest")(graph).graph_module
        assert any(str(layout.removeprefix("packed")) in str(node.target) for node in lowered.graph.nodes)
        exported = torch.export.export(lowered, (X,))
    held = exported.state_dict | exported.constants
    names = [name for name, tensor in held.items() if isinstance(tensor, Tensor)]
    assert len(names) == (2 if layout == "packed24" else 3)
    for name in names:
        sound = held[name]
        whole = sound.dtype.is_floating_point
        broken = [sound[:-1], sound[..., :1], sound.reshape(-1), sound.double() if whole else sound.long() + 7]
        broken += [] if whole else [torch.full_like(sound, torch.iinfo(sound.dtype).max)]
        for tensor in broken:
            if tensor.shape == sound.shape and tensor.dtype is sound.dtype and torch.equal(tensor, sound):
                continue
            owner = exported.state_dict if name in exported.state_dict else exported.constants
            owner[name] = tensor.contiguous().clone()
            torch.export.save(exported, tmp_path / "net.pt2")
            owner[name] = sound
            with torch.no_grad(), pytest.raises((BackendError, RuntimeError)) as caught:
                torch.export.load(tmp_path / "net.pt2").module()(X)
            assert isinstance(caught.value, BackendError), (name, tensor.shape, caught.value)
