"""What is sent of a part is that part again, to the bit, and no more than it takes."""

import pytest
import torch

from sparsify.prune.sending import FORMS, form_of, packed, unpacked
from sparsify.runtime.codes import pack_bits, unpack_bits
from sparsify.tensors import as_whole_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pruned(kind, dense, generator):
    gone = torch.rand(dense.shape, generator=generator) < 0.5
    moved = dense + torch.rand(dense.shape, generator=generator).to(dense.dtype) + 0.01
    return {
        "masked": dense.masked_fill(gone, 0),
        "moved": moved.masked_fill(gone, 0),
        "rounded": moved,
        # Equal to a mask as numbers are, and not as bits are.
        "signed": dense * ~gone,
        "nothing": dense.clone(),
    }[kind]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 8), (3, 7, 13)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["masked", "moved", "rounded", "signed", "nothing"])
def test_a_part_comes_back_in_every_form_that_it_has(kind, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    # Not as it lies in memory: rows of a stack of experts are not.
    dense = torch.randn(shape[1], shape[0], shape[2], generator=generator).to(dtype).transpose(0, 1)
    part = pruned(kind, dense, generator)
    least = form_of(part, dense)
    for form in FORMS[FORMS.index(least) :]:
        pieces = packed(part, form)
        waiting = iter(pieces)

        def take(count, of, waiting=waiting):
            piece = next(waiting)
            assert piece.shape == (count,) and piece.dtype == of
            return piece

        found = unpacked(dense, form, take)
        assert found.dtype == dtype and as_whole_numbers(found).equal(as_whole_numbers(part))
        assert next(waiting, None) is None


def test_a_mask_takes_a_bit_a_number_and_moved_weights_what_is_left():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 64, 64, generator=generator).bfloat16()

    def sent(kind):
        part = pruned(kind, dense, generator)
        return sum(piece.numel() * piece.element_size() for piece in packed(part, form_of(part, dense)))

    assert sent("masked") == sent("nothing") == 64 * 64 // 8
    assert sent("rounded") == 64 * 64 * 2
    assert 0.5 < sent("moved") / sent("rounded") < 0.65
    # Zeros that have a sign are told as they are.
    assert sent("signed") > sent("masked")


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 1000])
def test_bits_are_the_booleans_that_they_were(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    bits = pack_bits(mask)
    assert len(bits) == -(-count // 8)
    assert unpack_bits(bits)[:count].equal(mask)
    assert [bool(bits[n // 8] >> n % 8 & 1) for n in range(count)] == mask.tolist()
