"""Packed layouts: there and back, bit for bit, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import DTYPES, by_hand_24, by_hand_bitmask, pruned, pruned_24
from torch import Tensor

from sparsify.errors import CheckpointError, PatternError, Refused
from sparsify.runtime.codes import row_starts
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.layout import (
    PADDING,
    Packed,
    choose_layout,
    concatenate,
    holds_24,
    pack,
    packed_bytes,
    unpack,
)
from sparsify.runtime.soundness import check
from sparsify.runtime.words import LAYOUTS, Layout

shapes = st.tuples(st.integers(1, 9), st.integers(1, 140))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@given(shapes, st.integers(0, 2**31), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_bitmask_comes_back_bit_for_bit(shape: tuple[int, int], seed: int, dtype: torch.dtype, zeros: float) -> None:
    weight = pruned(*shape, zeros, dtype, seed)
    packed = pack(weight, "bitmask")
    weight[weight == 0] = 0.0  # of -0.0 only the zero is kept
    check("w", packed)
    for back in (unpack(packed), unpacked(packed, row_starts(packed.codes))):
        assert torch.equal(bits(back), bits(weight))
    assert packed.nbytes == packed_bytes(weight, "bitmask")


@given(shapes, st.integers(0, 2**31), st.sampled_from(DTYPES), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_packed24_comes_back_bit_for_bit(shape: tuple[int, int], seed: int, dtype: torch.dtype, more: float) -> None:
    weight = pruned_24(*shape, dtype, seed)
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < more] = 0.0
    weight[weight == 0] = 0.0
    packed = pack(weight, "packed24")
    check("w", packed)
    for back in (unpack(packed), unpacked(packed)):
        assert torch.equal(bits(back), bits(weight))
    assert packed.nbytes == packed_bytes(weight, "packed24")


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 4), (2, 63), (5, 64), (4, 70), (1, 130)])
def test_the_format_as_it_is_documented(rows: int, columns: int) -> None:
    weight = pruned_24(rows, columns)
    packed = pack(weight, "packed24")
    full = -(-columns // 64) * 64
    assert packed.values.shape == (rows, full // 2) and packed.codes.shape == (rows, full // 8)
    assert torch.equal(by_hand_24(packed.values, packed.codes, rows, columns), weight)
    packed = pack(weight, "bitmask")
    assert packed.codes.shape == (rows, full // 32) and packed.codes.dtype == torch.int32
    assert torch.equal(by_hand_bitmask(packed.values, packed.codes, rows, columns), weight)


def test_nibbles_are_those_of_sparse_tensor_cores() -> None:
    rows = [[a, b, c, d] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1) if a + b + c + d <= 2]
    weight = torch.tensor(rows, dtype=torch.float32).repeat(1, 16)
    codes = pack(weight, "packed24").codes
    nibbles = {int(c) & 15 for c in codes.flatten()} | {int(c) >> 4 for c in codes.flatten()}
    assert nibbles == {4, 8, 9, 12, 13, 14}


def test_special_values() -> None:
    tiny, huge = 1e-45, 3e38
    weight = torch.tensor([[-0.0, tiny, 0.0, huge, float("inf"), -0.0, -1.0, 0.0]])
    for layout in LAYOUTS:
        back = unpack(pack(weight, layout))
        assert torch.equal(back, weight) and torch.equal(bits(back)[0, [1, 3, 4, 6]], bits(weight)[0, [1, 3, 4, 6]])
        assert int(bits(back)[0, 0]) == 0, "-0.0 is a zero"


def test_empty_and_full_rows() -> None:
    weight = torch.zeros(4, 70)
    weight[1] = torch.arange(1, 71)
    packed = pack(weight, "bitmask")
    assert row_starts(packed.codes).tolist() == [0, 0, 70, 70, 70] and torch.equal(unpack(packed), weight)
    empty = pack(torch.zeros(3, 8), "packed24")
    check("w", empty)
    assert torch.equal(unpack(empty), torch.zeros(3, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_one_below_the_other(layout: Layout) -> None:
    parts = [pruned_24(rows, 70, seed=rows) for rows in (1, 3, 2)]
    joined = concatenate([pack(part, layout) for part in parts])
    check("w", joined)
    assert torch.equal(unpack(joined), torch.cat(parts))


def test_what_is_refused() -> None:
    with pytest.raises(PatternError, match="a NaN"):
        pack(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]), "bitmask")
    with pytest.raises(PatternError, match="more than two values"):
        pack(torch.ones(2, 8), "packed24")
    with pytest.raises(PatternError, match="float64"):
        pack(torch.zeros(2, 8, dtype=torch.float64), "bitmask")
    with pytest.raises(PatternError, match=r"tensor \[8\]"):
        pack(torch.zeros(8), "bitmask")


def test_the_layout_that_is_chosen_and_why_none() -> None:
    assert choose_layout(pruned_24(64, 64)) == "packed24"
    assert choose_layout(pruned(64, 64, 0.6)) == "bitmask"
    assert choose_layout(pruned_24(64, 64), "bitmask") == "bitmask"
    assert choose_layout(pruned(64, 64, 0.6), "packed24") == Refused("not 2:4 along its inputs")
    assert choose_layout(torch.ones(8, 8)) == Refused("no zeros")
    for weight, why in (
        (pruned(64, 64, 0.01), "too few"),
        (torch.zeros(8, 8, dtype=torch.int8), "int8"),
        (torch.tensor([[0.0, float("nan"), 0.0, 0.0]]), "NaN"),
    ):
        left = choose_layout(weight)
        assert isinstance(left, Refused) and why in left.reason
    # Along the other axis it is no 2:4.
    assert not holds_24(pruned_24(64, 64).t()) and choose_layout(pruned_24(64, 64).t()) == "bitmask"


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 0.57), (torch.float16, 0.57), (torch.float32, 0.54)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_zeros_take_little_more_than_half(layout: Layout, dtype: torch.dtype, bar: float) -> None:
    weight = pruned_24(256, 512, dtype)
    assert pack(weight, layout).nbytes <= bar * weight.nbytes


def corrupt(packed: Packed, seed: int) -> Packed:
    """One thing changed: a byte of the codes, a shape, a dtype, a length."""
    generator = torch.Generator().manual_seed(seed)
    values, codes = packed.values.clone(), packed.codes.clone()
    kind = seed % 6
    if kind in (0, 1, 2):
        flat = codes.view(torch.uint8).view(-1)
        at = int(torch.randint(flat.numel(), (), generator=generator))
        flat[at] = int(torch.randint(256, (), generator=generator))
    elif kind == 3:
        values = values.flatten()[: -1 - seed % 5] if packed.layout == "bitmask" else values[:, :-1]
    elif kind == 4:
        codes = codes[:-1] if codes.shape[0] > 1 else codes[:, :-1]
    else:
        codes = codes.to(torch.int64)
    return Packed(packed.layout, packed.shape, values, codes)


@given(st.integers(0, 2**20), st.sampled_from(LAYOUTS), shapes)
@settings(max_examples=150, deadline=None)
def test_a_corrupted_matrix_is_refused_or_harmless(seed: int, layout: Layout, shape: tuple[int, int]) -> None:
    broken = corrupt(pack(pruned_24(*shape, seed=seed), layout), seed)
    try:
        check("w", broken)
    except CheckpointError as refused:
        assert "packed tensor w" in str(refused) and "pack it again" in str(refused)
        return
    # What the check lets through is a sound matrix of other values: kernels and reference agree on it.
    starts = row_starts(broken.codes) if layout == "bitmask" else None
    assert torch.equal(unpacked(broken, starts), unpack(broken)) and unpack(broken).shape == shape


def test_every_kind_of_damage_has_a_sentence() -> None:
    good = pack(pruned_24(4, 70), "packed24")
    mask = pack(pruned_24(4, 70), "bitmask")

    def says(packed: Packed, text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            check("w", packed)

    bad = good.codes.clone()
    bad[0, 0] = 0x00
    says(Packed("packed24", (4, 70), good.values, bad), "not two ascending positions")
    says(Packed("packed24", (4, 70), good.values[:, 1:], good.codes), "values")
    says(Packed("packed24", (4, 70), good.values, good.codes[1:]), "codes")
    padded = good.values.clone()
    padded[:, -1] = 1
    says(Packed("packed24", (4, 70), padded, good.codes), "only pad")
    says(Packed("bitmask", (4, 70), mask.values[1:], mask.codes), "for a mask that counts")
    tail = mask.values.clone()
    tail[-PADDING // 2] = 1
    says(Packed("bitmask", (4, 70), tail, mask.codes), "padding after the values")
    wide = mask.codes.clone()
    wide[0, -1] = -1
    kept = int(row_starts(wide)[-1])
    says(Packed("bitmask", (4, 70), torch.cat([torch.ones(kept), torch.zeros(64)]), wide), "only pad the matrix")
    says(Packed("bitmask", (4, 70), mask.values.double(), mask.codes), "float64")


def test_kernels_count_and_check_as_plain_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [pack(pruned(rows, columns, 0.4), "bitmask").codes for rows, columns in ((1, 1), (70, 130), (5, 4000))]
    every = torch.arange(256, dtype=torch.uint8).view(1, 256).expand(3, -1)
    good = pack(pruned_24(9, 700), "packed24")

    def seen() -> tuple[list[Tensor], list[bool]]:
        sound = []
        for byte in range(256):
            codes = good.codes.clone()
            codes[8, 40] = every[0, byte]
            try:
                check("w", Packed("packed24", (9, 700), good.values, codes))
                sound.append(True)
            except CheckpointError:
                sound.append(False)
        return [row_starts(mask) for mask in masks], sound

    starts, sound = seen()
    monkeypatch.setattr("sparsify.runtime.cpu.native.library", lambda: None)
    plain_starts, plain_sound = seen()
    assert all(torch.equal(a, b) for a, b in zip(starts, plain_starts, strict=True))
    assert sound == plain_sound and sum(sound) == 36


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_of_nothing_or_of_other_numbers_is_not_sound(layout: Layout) -> None:
    packed = pack(pruned_24(8, 64), layout)
    check("x", packed)
    wrong = [
        replace(packed, shape=(0, 64), values=packed.values[:0], codes=packed.codes[:0]),
        replace(packed, shape=(8, 0), values=packed.values[:0], codes=packed.codes[:, :0]),
        *(replace(packed, values=packed.values.to(dtype)) for dtype in (torch.float64, torch.int32, torch.bool)),
    ]
    for each in wrong:
        with pytest.raises(CheckpointError, match=r"packed tensor x: a matrix \["):
            check("x", each)
