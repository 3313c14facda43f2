"""Integers with scales, packed: there and back to the bit, byte for byte as by hand, and what is refused of files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.few_bits import pack_few
from support.matrices import DTYPES, pruned_24
from torch import Tensor

from sparsify.errors import CheckpointError, PatternError, Refused
from sparsify.runtime.codes import pack_nibbles, row_starts, unpack_nibbles
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.few_bits import PADDING, Integers, choose_few_layout, groups, padded, stored_bytes
from sparsify.runtime.layout import Packed, concatenate, pack_integers, unpack
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.soundness import check
from sparsify.runtime.words import FEW_LAYOUTS, Layout


def integers(
    layout: Layout,
    rows: int,
    columns: int,
    bits: int = 4,
    group: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    zeros: float = 0.5,
) -> Integers:
    """Every integer that ``bits`` have, 2:4 where the layout needs it; scales of either sign."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    whole = torch.randint(-half, half, (rows, columns), generator=generator)
    if layout == "packed24":
        whole *= pruned_24(rows, columns, seed=seed).ne(0)
    else:
        whole *= torch.rand(rows, columns, generator=generator) >= zeros
    scales = (torch.randn(rows, groups(columns, group), generator=generator) / half).bfloat16().half().to(dtype)
    return Integers(whole.to(torch.int8), scales, bits, group)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Layout, Integers]:
    layout = draw(st.sampled_from(FEW_LAYOUTS))
    matrix = integers(
        layout,
        draw(st.integers(1, 7)),
        draw(st.integers(1, 300)),
        draw(st.sampled_from([8, 4])),
        draw(st.sampled_from([None, 32, 64, 128])),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])),
    )
    return layout, matrix


def starts_of(packed: Packed) -> Tensor | None:
    return row_starts(packed.codes, packed.bits) if packed.layout == "bitmask" else None


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@given(matrices())
@settings(max_examples=120, deadline=None)
def test_there_and_back_to_the_bit(case: tuple[Layout, Integers]) -> None:
    layout, matrix = case
    packed = pack_integers(matrix, layout)
    check("w", packed)
    assert packed.nbytes == stored_bytes(matrix, layout) and packed.dtype == matrix.scales.dtype
    columns = matrix.shape[1]
    each = matrix.scales.double().repeat_interleave(matrix.group or columns, 1)[:, :columns]
    # Scale times integer is exact in float64 and float32: rounded once.
    want = (each * matrix.values).float().to(packed.dtype) + 0.0
    for back in (matrix.dense(), unpack(packed), unpacked(packed, starts_of(packed))):
        assert torch.equal(bits_of(back), bits_of(want)), "a zero is +0.0 whatever the sign of its scale"


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_the_bytes_are_those_of_the_document(case: tuple[Layout, Integers]) -> None:
    layout, matrix = case
    packed, hand = (
        pack_integers(matrix, layout),
        pack_few(matrix.values.long(), matrix.scales, layout, matrix.bits, matrix.group or 0),
    )
    own = list(PackedWeight.holding(packed).tensors.values())
    assert len(own) == len(hand.tensors)
    for mine, theirs in zip(own, hand.tensors, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_nibbles_are_twos_complement() -> None:
    every = torch.arange(-8, 8, dtype=torch.int8)
    packed = pack_nibbles(every)
    assert [b & 15 for b in packed.tolist()] == [8, 10, 12, 14, 0, 2, 4, 6]
    assert torch.equal(unpack_nibbles(packed), every)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_matrices_one_below_the_other(layout: Layout, bits: int, group: int | None) -> None:
    parts = [integers(layout, rows, 70, bits, group, seed=rows) for rows in (1, 3, 2)]
    joined = concatenate([pack_integers(part, layout) for part in parts])
    check("w", joined)
    assert torch.equal(unpack(joined), torch.cat([part.dense() for part in parts]))
    both = PackedWeight.joined([PackedWeight.holding(pack_integers(part, layout), exact=True) for part in parts])
    x = torch.randn(2, 70, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both.linear(x), x @ unpack(joined).t(), rtol=1e-4, atol=1e-4)
    assert both.exact and both.numbers == (bits, group or 0, True)


def test_the_layout_that_is_chosen() -> None:
    assert choose_few_layout(integers("packed24", 64, 256)) == "packed24"
    assert choose_few_layout(integers("packed24", 64, 256), "bitmask") == "bitmask"
    assert choose_few_layout(integers("packed24", 64, 256), "dense") == "dense"
    assert choose_few_layout(integers("bitmask", 64, 256, zeros=0.6)) == "bitmask"
    # A mask of one bit takes more than one zero of sixteen saves.
    assert choose_few_layout(integers("dense", 64, 256, zeros=0.0)) == "dense"
    assert choose_few_layout(integers("bitmask", 64, 256), "packed24") == Refused("not 2:4 along its inputs")
    # Sixteen columns are padded to 128: a bitmask keeps little of that.
    assert choose_few_layout(integers("packed24", 64, 16)) == "bitmask"
    left = choose_few_layout(integers("dense", 4, 3, dtype=torch.bfloat16))
    assert isinstance(left, Refused) and "4×3" in left.reason
    with pytest.raises(PatternError, match="more than two values"):
        pack_integers(integers("dense", 8, 64, zeros=0.0), "packed24")


@pytest.mark.parametrize(
    ("layout", "bits", "group", "per_weight"),
    [("packed24", 8, None, 5.0), ("packed24", 4, 64, 3.25), ("packed24", 4, 32, 3.5), ("dense", 4, 64, 4.25)],
)
def test_bits_a_weight(layout: Layout, bits: int, group: int | None, per_weight: float) -> None:
    packed = pack_integers(integers(layout, 256, 4096, bits, group, torch.bfloat16), layout)
    assert 8 * packed.nbytes / (256 * 4096) == pytest.approx(per_weight, rel=1e-3)


def corrupt(packed: Packed, seed: int) -> Packed:
    """One thing changed: a byte, a length, a dtype, a scale."""
    generator = torch.Generator().manual_seed(seed)
    values, codes, scales = packed.values.clone(), packed.codes.clone(), packed.scales
    assert scales is not None
    kind = seed % 7
    if kind < 3:
        flat = (codes if kind and codes.numel() else values).view(torch.uint8).view(-1)
        flat[int(torch.randint(flat.numel(), (), generator=generator))] = seed // 7 % 256
    elif kind == 3:
        values = values[: -1 - seed % 5] if packed.layout == "bitmask" else values[:, :-1]
    elif kind == 4:
        scales = scales[:, :-1] if seed % 2 else torch.cat([scales, scales])
    elif kind == 5:
        values = values.view(torch.uint8 if packed.bits == 8 else torch.int8)
    else:
        scales = scales.clone()
        scales[-1, -1] = float("nan") if seed % 2 else float("inf")
    return replace(packed, values=values, codes=codes, scales=scales)


@given(matrices(), st.integers(0, 2**20))
@settings(max_examples=200, deadline=None)
def test_a_corrupted_matrix_is_refused_or_harmless(case: tuple[Layout, Integers], seed: int) -> None:
    layout, matrix = case
    broken = corrupt(pack_integers(matrix, layout), seed)
    try:
        check("w", broken)
    except CheckpointError as refused:
        assert "packed tensor w" in str(refused) and "pack it again" in str(refused)
        return
    assert seed % 7 < 3, "only other numbers of the right kind pass"
    # What the check lets through is a sound matrix of other values: kernels and reference agree on it.
    back = unpack(broken)
    assert torch.equal(bits_of(unpacked(broken, starts_of(broken))), bits_of(back)) and back.shape == matrix.shape


def test_every_kind_of_damage_has_a_sentence() -> None:
    made = {layout: pack_integers(integers(layout, 4, 70, 4, 32), layout) for layout in FEW_LAYOUTS}

    def says(packed: Packed, text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            check("w", packed)

    for good in made.values():
        check("w", good)
        assert good.scales is not None
        says(replace(good, scales=good.scales.clone().fill_(float("nan"))), "no finite number")
        says(replace(good, scales=good.scales[:, 1:]), "scales")
        says(replace(good, scales=good.scales.double()), "float64")
        says(replace(good, bits=3), "3 bits")
        says(replace(good, values=good.values.view(torch.int8)), "4 bits in torch.int8")
        says(replace(good, group=64), "scales")
    for layout in ("packed24", "dense"):
        past = made[layout].values.clone()
        past[:, -1] = 1
        says(replace(made[layout], values=past), "only pad")
        says(replace(made[layout], values=past[:, 1:]), "values")
    bad = made["packed24"].codes.clone()
    bad[0, 0] = 0
    says(replace(made["packed24"], codes=bad), "not two ascending positions")
    mask = made["bitmask"]
    says(replace(mask, values=mask.values[1:]), "for a mask that counts")
    tail = mask.values.clone()
    tail[-PADDING // 2] = 1
    says(replace(mask, values=tail), "padding after the values")
    wide = mask.codes.clone()
    wide[0, -1] = -1
    kept = int(row_starts(wide, 4)[-1])
    says(replace(mask, codes=wide, values=torch.zeros(kept + PADDING, dtype=torch.uint8)), "only pad the matrix")
    says(replace(made["dense"], codes=torch.zeros(4, 1, dtype=torch.uint8)), "codes")


def test_rows_of_a_bitmask_begin_on_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_integers(integers("bitmask", 5, 300), "bitmask")
    starts = row_starts(packed.codes, 4)
    kept = unpack(packed).ne(0)
    full = torch.nn.functional.pad(kept, (0, padded(300) - 300)).view(5, -1, 64)
    assert starts.diff().tolist() == [sum((int(b.sum()) + 1) // 2 for b in row) for row in full]
    assert int(starts[-1]) + PADDING == packed.values.numel()
    monkeypatch.setattr("sparsify.runtime.cpu.native.library", lambda: None)
    assert torch.equal(row_starts(packed.codes, 4), starts)
