"""The layouts that lie in GPU memory, against the portable one and against torch's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import pruned_24
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsify.runtime.cuda import compressed
from sparsify.runtime.cuda.fragments import TILE_BYTES, from_fragments, tiles, to_fragments
from sparsify.runtime.layout import Packed, pack


def same(one: Packed, other: Packed) -> bool:
    """Bit for bit."""
    bits = torch.int16
    return torch.equal(one.values.view(bits), other.values.view(bits)) and torch.equal(one.codes, other.codes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 600), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 99))
def test_fragments_give_back_what_was_packed(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    packed = pack(pruned_24(rows, columns, dtype, seed), "packed24")
    fragments = to_fragments(packed)
    assert fragments.shape == (*tiles(rows, columns), TILE_BYTES)
    assert same(from_fragments(fragments, dtype, rows, columns), packed)
    # As a layer holds it: in the weight's dtype.
    assert same(from_fragments(fragments.view(dtype), dtype, rows, columns), packed)


def test_every_group_lies_where_kernels_look_for_it() -> None:
    """kernels/fragments.h, one group after the other."""
    rows, columns = 40, 520
    packed = pack(pruned_24(rows, columns, torch.bfloat16), "packed24")
    tile = to_fragments(packed).view(*tiles(rows, columns), 9, 32, 16)
    values, codes = packed.values.view(torch.int16), packed.codes
    for row in range(rows):
        g, half = row % 8, row % 16 // 8
        for group in range(columns // 4):
            k, chunk, place = group // 64, group % 64 // 8, group % 8
            m = next(m for m in range(8) if 4 * (m & 1) + (m >> 1) == place)
            lane, register = 4 * g + m % 4, 2 * (m // 4) + half
            there = tile[row // 16, k, chunk, lane].view(torch.int16)[2 * register : 2 * register + 2]
            assert torch.equal(there, values[row, 2 * group : 2 * group + 2])
            words = tile[row // 16, k, 8, 4 * g + 2 * (chunk & 1) + m // 4].view(torch.int16)
            code = int(words[2 * (chunk >> 1) + half]) >> (4 * (m % 4)) & 15
            assert code == int(codes[row, group // 2]) >> (4 * (group % 2)) & 15


def test_padding_multiplies_nothing() -> None:
    packed = pack(pruned_24(17, 260, torch.bfloat16), "packed24")
    whole = from_fragments(to_fragments(packed), torch.bfloat16, 32, 512)
    assert not bool(whole.values[17:].any()) and not bool(whole.values[:, 130:].any())
    # A code that is none would make the tensor core read anything.
    assert bool(((whole.codes & 3) < (whole.codes >> 2 & 3)).all())
    assert bool(((whole.codes >> 4 & 3) < (whole.codes >> 6)).all())


def test_cutlass_takes_what_torch_would_give_it() -> None:
    for rows, columns, dtype in ((32, 64, torch.bfloat16), (96, 192, torch.float16), (64, 640, torch.bfloat16)):
        dense = pruned_24(rows, columns, dtype)
        packed = pack(dense, "packed24")
        values, codes = compressed.compress(packed, "cutlass")
        theirs = sparse_semi_structured_from_dense_cutlass(dense)
        assert codes is not None and torch.equal(values, theirs[0]) and torch.equal(codes, theirs[1])
        assert same(compressed.decompress(values, codes, (rows, columns)), packed)


def test_what_the_libraries_do_not_take_is_said() -> None:
    assert compressed.unfit("cutlass", 32, 64) is None and compressed.unfit("cusparselt", 16, 16) is None
    assert "32" in str(compressed.unfit("cutlass", 48, 64)) and "16" in str(compressed.unfit("cusparselt", 16, 24))
    assert compressed.library_of((8, 9)) == "cutlass" and compressed.library_of((9, 0)) == "cusparselt"
