"""Parts of packed matrices, as ranks hold them, against parts of the dense ones: to the bit, and sound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import DTYPES, pruned, pruned_24
from torch import Tensor

from sparsify.errors import PatternError
from sparsify.runtime.few_bits import Integers, groups
from sparsify.runtime.layout import Packed, concatenate, pack, pack_integers, unpack
from sparsify.runtime.shard import columns_of, rows_of, with_rows
from sparsify.runtime.soundness import check

KINDS = [(layout, None) for layout in ("packed24", "bitmask")]
KINDS += [(layout, bits) for layout in ("packed24", "bitmask", "dense") for bits in (8, 4)]


def packed_of(
    kind: tuple[str, int | None], rows: int, columns: int, group: int | None, dtype: torch.dtype, seed: int
) -> Packed:
    layout, bits = kind
    if layout == "packed24":
        weight = pruned_24(rows, columns, dtype, seed)
    else:
        weight = pruned(rows, columns, 0.5 if layout == "bitmask" else 0.1, dtype, seed)
    if bits is None:
        return pack(weight, layout)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    whole = torch.randint(-half, half, (rows, columns), generator=generator) * weight.ne(0)
    scales = torch.randn(rows, groups(columns, group), generator=generator).bfloat16().to(dtype)
    return pack_integers(Integers(whole.to(torch.int8), scales, bits, group), layout)  # type: ignore[arg-type]


def dense_of(part: Packed | Tensor) -> Tensor:
    if isinstance(part, Tensor):
        return part
    check("a part", part)
    return unpack(part)


@st.composite
def matrices(draw: st.DrawFn, unit: int = 1) -> tuple[Packed, int]:
    """A packed matrix, and a number of ranks that divides its columns."""
    ranks = draw(st.integers(1, 4))
    columns = ranks * unit * draw(st.integers(1, 256 // unit))
    packed = packed_of(
        draw(st.sampled_from(KINDS)),
        ranks * draw(st.integers(1, 5)),
        columns,
        draw(st.sampled_from([None, 32, 64, 128])),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2**31)),
    )
    return packed, ranks


@settings(max_examples=150, deadline=None)
@given(case=matrices())
def test_the_rows_of_all_ranks_are_the_matrix(case: tuple[Packed, int]) -> None:
    packed, ranks = case
    each = packed.shape[0] // ranks
    parts = [rows_of(packed, rank * each, each) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(dense_of(part), unpack(packed)[rank * each : (rank + 1) * each])
        assert (part.layout, part.bits, part.group) == (packed.layout, packed.bits, packed.group)
    # What was cut goes together again, byte for byte.
    whole = concatenate(parts)
    assert torch.equal(whole.values, packed.values) and torch.equal(whole.codes, packed.codes)


@settings(max_examples=300, deadline=None)
@given(case=st.one_of(matrices(), matrices(unit=32), matrices(unit=64)))
def test_the_columns_of_all_ranks_are_the_matrix(case: tuple[Packed, int]) -> None:
    packed, ranks = case
    each = packed.shape[1] // ranks
    parts = [dense_of(columns_of(packed, rank * each, each)) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts, dim=1), unpack(packed))


@settings(max_examples=100, deadline=None)
@given(case=matrices(), data=st.data())
def test_any_columns_are_those_of_the_dense_matrix(case: tuple[Packed, int], data: st.DataObject) -> None:
    packed, _ = case
    first = data.draw(st.integers(0, packed.shape[1] - 1))
    count = data.draw(st.integers(1, packed.shape[1] - first))
    part = columns_of(packed, first, count)
    assert torch.equal(dense_of(part), unpack(packed)[:, first : first + count])


@pytest.mark.parametrize(
    ("kind", "group", "first", "count", "layout", "left"),
    [
        (("packed24", None), None, 64, 64, "packed24", None),
        (("packed24", None), None, 128, 72, "packed24", None),  # to a ragged end
        (("packed24", None), None, 100, 100, "packed24", None),  # groups of four stay whole
        (("packed24", None), None, 50, 100, "bitmask", None),  # a group is cut in two
        (("bitmask", None), None, 50, 100, "bitmask", None),
        (("packed24", 8), None, 100, 100, "packed24", None),
        (("packed24", 4), 64, 64, 136, "packed24", 64),
        (("dense", 4), 128, 64, 136, "dense", 64),  # half a group is a group
        (("dense", 8), 128, 32, 64, "dense", 32),
        (("packed24", 4), 64, 100, 100, "packed24", None),  # no scale fits: of full width
        (("bitmask", 4), 64, 100, 100, "bitmask", None),
        (("dense", 4), 64, 100, 100, None, None),
    ],
)
def test_the_layout_of_a_part(
    kind: tuple[str, int | None], group: int | None, first: int, count: int, layout: str | None, left: int | None
) -> None:
    packed = packed_of(kind, 6, 200, group, torch.float32, 3)
    part = columns_of(packed, first, count)
    assert torch.equal(dense_of(part), unpack(packed)[:, first : first + count])
    if layout is None:
        assert isinstance(part, Tensor)
        return
    assert isinstance(part, Packed) and part.layout == layout
    assert part.group == left
    fits = kind[1] is not None and (group is None or left is not None)
    assert part.bits == (kind[1] if fits else None)


def test_a_part_holds_on_to_nothing_else() -> None:
    for kind in KINDS:
        packed = packed_of(kind, 64, 256, 64, torch.bfloat16, 1)
        for part in (rows_of(packed, 32, 32), columns_of(packed, 128, 128)):
            assert isinstance(part, Packed)
            held = [part.values, part.codes, *([] if part.scales is None else [part.scales])]
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in held), kind


@pytest.mark.parametrize("cut", [rows_of, columns_of])
@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 0), (5, 4), (9, 1)])
def test_what_the_matrix_has_not_is_refused(cut: object, first: int, count: int) -> None:
    packed = packed_of(("packed24", None), 8, 8, None, torch.float32, 0)
    with pytest.raises(PatternError, match="it has 8"):
        cut(packed, first, count)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(case=matrices(), more=st.integers(0, 70))
def test_rows_of_zeros_below(case: tuple[Packed, int], more: int) -> None:
    packed, _ = case
    rows = packed.shape[0]
    whole = dense_of(with_rows(packed, rows + more))
    assert torch.equal(whole[:rows], unpack(packed)) and not bool(whole[rows:].any())
    assert whole.shape[0] == rows + more
