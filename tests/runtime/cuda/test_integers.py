"""The CUDA kernels for 2:4 weights of integers, by the emulator, and the layout that they read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import emulate
from support.few_bits import few
from support.matrices import error
from torch import Tensor

from sparsify.runtime.cuda.fragments import TILE_BYTES, tiles
from sparsify.runtime.cuda.integers import GRIDS, IntegerGrid, grid_in, pack_fragments, unpack_fragments
from sparsify.runtime.cuda.variants import INTEGERS, Variant
from sparsify.runtime.layout import Packed, unpack

SHAPES = ((16, 256), (7, 64), (33, 1100), (100, 840), (20, 2568))


def weight(grid: IntegerGrid, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Packed]:
    """The matrix in float64, scale times integer unrounded, and packed."""
    made = few("packed24", *shape, grid.bits, grid.group or 0, dtype, seed=shape[0])
    scales, values, codes = made.tensors
    return made.unrounded, Packed("packed24", shape, values, codes, scales, grid.bits, grid.group)


def check(variant: Variant, dtype: torch.dtype, shape: tuple[int, int], tokens: int) -> None:
    assert variant.grid is not None
    exact, packed = weight(variant.grid, shape, dtype)
    fragments = pack_fragments(packed)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    if shape[1] % 8:
        # As the product pads them.
        x, exact = (torch.nn.functional.pad(one, (0, -shape[1] % 8)) for one in (x, exact))
    wanted = x.double() @ exact.t() + bias.double()
    y = emulate.linear(variant, x, fragments, shape[0], bias)
    # Nothing but the result is rounded.
    assert error(y, wanted) < (4e-3 if dtype is torch.bfloat16 else 5e-4), (variant.name, dtype, shape, tokens)
    assert torch.equal(y, emulate.linear(variant, x, fragments, shape[0], bias, backwards=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)
def test_against_float64_on_ragged_shapes(grid: IntegerGrid, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one, two = (v for v in INTEGERS if v.grid == grid)
    for number, shape in enumerate(SHAPES):
        check(one, dtype, shape, (1, 8, 5, 3, 7)[number])
        check(two, dtype, shape, (16, 9, 2, 12, 1)[number])


@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(tokens: int) -> None:
    torch.manual_seed(tokens)
    for variant in INTEGERS:
        if variant.fits(tokens, 328):
            check(variant, torch.bfloat16, (20, 328), tokens)


@pytest.mark.parametrize(("splits", "early"), [(2, False), (4, True), (8, False)])
def test_columns_that_a_cluster_shares(splits: int, early: bool) -> None:
    torch.manual_seed(0)
    for variant in (INTEGERS[0], INTEGERS[7], INTEGERS[-1]):
        check(replace(variant, splits=splits, early=early), torch.bfloat16, (36, 2304), 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)
def test_unpacking_is_exact(grid: IntegerGrid, dtype: torch.dtype) -> None:
    """The numbers of the grid, each rounded once as every other reader rounds them."""
    for rows, columns in ((16, 256), (7, 64), (100, 1096)):
        _, packed = weight(grid, (rows, columns), dtype)
        dense, fragments = unpack(packed), pack_fragments(packed)
        assert torch.equal(emulate.unpacked(fragments, dtype, 0, rows, columns), dense)
    assert torch.equal(emulate.unpacked(fragments, dtype, 32, 20, columns), dense[32:52])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.kind)
def test_the_layout_there_and_back(grid: IntegerGrid) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for shape in SHAPES:
            _, packed = weight(grid, shape, dtype)
            fragments = pack_fragments(packed)
            assert fragments.shape == (*tiles(*shape), grid.tile_bytes) and grid_in(fragments.view(dtype)) == grid
            back = unpack_fragments(fragments.view(dtype), dtype, *shape)
            for name in ("values", "codes", "scales"):
                assert torch.equal(getattr(back, name), getattr(packed, name)), name
            assert (back.shape, back.bits, back.group) == (packed.shape, packed.bits, packed.group)


def test_no_two_grids_have_tiles_of_one_length() -> None:
    lengths = [grid.tile_bytes for grid in GRIDS]
    assert len({TILE_BYTES, *lengths}) == 1 + len(lengths) and not any(n % 16 for n in lengths)
    # 5 and 3 bits a weight, and the scales.
    assert [8 * n / 4096 for n in lengths if n in (2592, 1568)] == [5.0625, 3.0625]
