"""Attention of one token of each sequence: near to float64 on every instruction set, whatever the strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import isas, running
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.runtime import ops
from sparsify.runtime.cpu import native

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Both sides of a chunk of positions.
POSITIONS = st.one_of(st.integers(1, 40), st.sampled_from((255, 256, 257, 512, 700)))
MASKS = ("none", "bools", "bools of heads", "floats", "own floats")


def tensors(
    sequences: int, groups: int, group: int, positions: int, width: int, value_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(positions)
    query = torch.randn(sequences, groups * group, 1, width, generator=generator).to(dtype)
    key = torch.randn(sequences, groups, positions, width, generator=generator).to(dtype)
    return query, key, torch.randn(sequences, groups, positions, value_width, generator=generator).to(dtype)


def masked(kind: str, query: Tensor, positions: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    heads = query.shape[1] if kind == "bools of heads" else 1
    keep = torch.rand(query.shape[0], heads, 1, positions, generator=generator) < 0.6
    keep[..., 0] = True
    if kind.startswith("bools"):
        return keep
    floats = torch.randn(keep.shape, generator=generator).masked_fill(~keep, float("-inf"))
    return floats.to(query.dtype if kind == "own floats" else torch.float32)


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One number after the other, in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask.double()
    return scores.softmax(-1) @ value


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from((1, 2, 3, 4, 5, 7, 8)),
    POSITIONS,
    st.sampled_from((16, 48, 64, 80, 128)),
    st.sampled_from((16, 64, 112)),
    st.sampled_from(tuple(TOLERANCE)),
    st.sampled_from(MASKS),
)
def test_as_near_as_its_dtype(
    sequences: int, groups: int, group: int, positions: int, width: int, values: int, dtype: torch.dtype, mask: str
) -> None:
    query, key, value = tensors(sequences, groups, group, positions, width, values, dtype)
    over = masked(mask, query, positions)
    truth = exact(query, key, value, over, 0.2)
    for isa in isas():
        with running(isa):
            got = ops.attend(query, key, value, over, 0.2)
        with running(isa, threads=3):
            again = ops.attend(query, key, value, over, 0.2)
        assert got.dtype is dtype and got.shape == truth.shape
        assert float((got.double() - truth).abs().max()) < TOLERANCE[dtype] * float(value.double().abs().max()), isa
        assert torch.equal(got, again), "threads change no bit"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kept_keys_are_read_where_they_lie(dtype: torch.dtype) -> None:
    """A part of a static cache, heads that come from one projection, tensors that are every other number of another."""
    query, key, value = tensors(2, 2, 3, 90, 32, 48, dtype)
    want = ops.attend(query, key, value, None, 0.1)
    room = torch.full((2, 2, 200, 32), float("nan"), dtype=dtype)
    room[:, :, 50:140] = key
    assert torch.equal(ops.attend(query, room[:, :, 50:140], value, None, 0.1), want)
    by_token = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attend(query, key, by_token, None, 0.1), want)
    apart = torch.stack([query, query], -1)[..., 0]
    assert apart.stride(3) == 2 and torch.equal(ops.attend(apart, key, value, None, 0.1), want)
    rows = query[:, :, 0].unsqueeze(1).transpose(1, 2)
    assert torch.equal(ops.attend(rows, key, value, None, 0.1), want)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_a_mask_leaves_out_is_not_read(dtype: torch.dtype) -> None:
    """The empty places of a cache may hold anything, and where nothing is left the answer is zero."""
    query, key, value = tensors(1, 2, 2, 300, 16, 16, dtype)
    keep = torch.zeros(1, 1, 1, 300, dtype=torch.bool)
    keep[..., 20:31] = True
    want = ops.attend(query, key[:, :, 20:31], value[:, :, 20:31], None, 0.25)
    key[:, :, 31:], value[:, :, 31:] = float("nan"), float("inf")
    for isa in isas():
        with running(isa):
            got = ops.attend(query, key, value, keep, 0.25)
            torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=1e-6)
            assert not ops.attend(query, key, value, torch.zeros_like(keep), 0.25).any()


def test_what_is_not_finite_stays_so() -> None:
    query, key, value = tensors(1, 1, 2, 270, 16, 16, torch.float32)
    key[0, 0, 260, 3] = float("nan")
    for isa in isas():
        with running(isa):
            assert ops.attend(query, key, value, None, 1.0).isnan().all(), isa
    key[0, 0, 260] = 0
    value[0, 0, 5, 7] = float("inf")
    for isa in isas():
        with running(isa):
            got = ops.attend(query, key, value, None, 0.01)
            assert got[..., 7].isinf().all() and got[..., :7].isfinite().all(), isa


def test_scores_far_apart() -> None:
    """The highest alone counts, and nothing overflows on the way."""
    query, key, value = tensors(1, 1, 1, 500, 16, 16, torch.float32)
    key[0, 0, 77] = query[0, 0, 0] * 50
    for isa in isas():
        with running(isa):
            torch.testing.assert_close(ops.attend(query, key, value, None, 30.0)[0, 0, 0], value[0, 0, 77])
            torch.testing.assert_close(
                ops.attend(query, key * 0, value, None, 30.0), value.mean(2, keepdim=True), rtol=1e-4, atol=1e-6
            )


def test_what_is_not_one_token_is_refused() -> None:
    query, key, value = tensors(1, 2, 2, 9, 16, 16, torch.float32)
    wrong = {
        "two tokens": (query.expand(1, 4, 2, 16), key, value, None),
        "heads that do not divide": (query[:, :3], key, value, None),
        "another dtype": (query, key.half(), value, None),
        "a dtype without kernels": (query.double(), key.double(), value.double(), None),
        "another width": (query[..., :8], key[..., :8], value, None),
        "other positions": (query, key, value[:, :, :8], None),
        "a mask of other positions": (query, key, value, torch.ones(1, 1, 1, 8, dtype=torch.bool)),
        "a mask of numbers": (query, key, value, torch.ones(1, 1, 1, 9, dtype=torch.int32)),
        "no positions": (query, key[:, :, :0], value[:, :, :0], None),
    }
    for what, given_ in wrong.items():
        with pytest.raises(BackendError, match="attention of one token") as caught:
            ops.attend(*given_, 1.0)
        assert "scaled_dot_product_attention" in str(caught.value), what


def test_without_kernels_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors(2, 2, 2, 30, 16, 32, torch.float32)
    mask = masked("floats", query, 30)
    want = ops.attend(query, key, value, mask, 0.3)
    monkeypatch.setattr(native, "library", lambda: None)
    torch.testing.assert_close(ops.attend(query, key, value, mask, 0.3), want)


def test_in_a_compiled_graph() -> None:
    query, key, value = tensors(2, 2, 2, 30, 16, 32, torch.float32)

    def twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.attend(query, key, value, None, 0.3) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value), twice(query, key, value))
