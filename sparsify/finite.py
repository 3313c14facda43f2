"""Tensors looked at for NaN and infinity as their bytes go by: in pieces that stay in a core's cache, nothing copied.

Every number whose exponent is all ones is NaN or infinity. Doubled as whole numbers, which drops the sign, just these
are no less than one bound: an addition and a maximum, as fast as memory gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.tensors import as_bytes

# Of each dtype the whole numbers of its width, and what a doubled number is at least that is not finite.
_BOUNDS: dict[torch.dtype, tuple[Any, int]] = {
    torch.float64: (np.uint64, 0xFFE0_0000_0000_0000),
    torch.float32: (np.uint32, 0xFF00_0000),
    torch.float16: (np.uint16, 0xF800),
    torch.bfloat16: (np.uint16, 0xFF00),
    torch.float8_e5m2: (np.uint8, 0xF8),
    torch.float8_e4m3fn: (np.uint8, 0xFE),  # NaN alone: it has no infinity
}
# Numbers of a byte of which one is NaN and none is infinite.
_ONE_NAN: dict[torch.dtype, int] = {
    torch.float8_e4m3fnuz: 0x80,
    torch.float8_e5m2fnuz: 0x80,
    torch.float8_e8m0fnu: 0xFF,
}
# Tensors that add to scores and forbid by minus infinity, where a checkpoint holds them: GPT-2's and GPT-Neo's
# ``masked_bias`` is -1e9, which float16 does not hold; T5's and BART's ``final_logits_bias`` forbids tokens.
MASKS = frozenset({"masked_bias", "attn_mask", "attention_mask", "causal_mask", "mask", "final_logits_bias"})
# Where Gemma 4 clips the inputs and outputs of a layer: nowhere, until it is trained otherwise.
CLIPS = frozenset({"input_min", "input_max", "output_min", "output_max"})
_PIECE = 1 << 20
ALLOW = "--allow-nan (allow_nan=True) takes it as it is"


@dataclass
class Scan:
    """Counts what is not finite among numbers of ``dtype`` whose bytes are shown piece by piece.

    Attributes:
        mask: let minus infinity pass, or at 2 both infinities. count: how many were found. first: the index of the
            first, row by row.
    """

    dtype: torch.dtype
    mask: int = False
    count: int = 0
    first: int = -1
    _seen: int = 0
    _rest: bytes = b""
    _work: Any = field(default=None, repr=False)

    @staticmethod
    def reads(dtype: torch.dtype) -> bool:
        """Whether numbers of ``dtype`` may be NaN and are read here as bytes."""
        return dtype in _BOUNDS or dtype in _ONE_NAN

    def update(self, data: Any, /) -> None:
        """Look at the bytes that follow; they may end within a number."""
        if (nan := _ONE_NAN.get(self.dtype)) is not None:
            numbers = np.frombuffer(data, dtype=np.uint8)
            self._note(numbers, numbers == nan, 0)
            self._seen += len(numbers)
            return
        kind, bound = _BOUNDS[self.dtype]
        width = np.dtype(kind).itemsize
        if self._rest or len(data) % width:
            data = self._rest + bytes(data)
            self._rest = data[len(data) - len(data) % width :]
            data = memoryview(data)[: len(data) - len(self._rest)]
        numbers = np.frombuffer(data, dtype=kind)
        if not len(numbers):
            return
        if self._work is None or len(self._work) < len(numbers):
            self._work = np.empty(len(numbers), kind)
        doubled = np.add(numbers, numbers, out=self._work[: len(numbers)])
        if int(doubled.max()) >= bound:
            self._note(numbers, doubled >= bound, bound)
        self._seen += len(numbers)

    def _note(self, numbers: Any, bad: Any, bound: int) -> None:
        if self.mask and bound:
            sign = 1 << (8 * numbers.itemsize - 1)
            bad &= numbers != sign | bound >> 1
            if self.mask == 2:
                bad &= numbers != bound >> 1
        if bad.any():
            self.first = self.first if self.count else self._seen + int(bad.argmax())
            self.count += int(bad.sum())


def scan(tensor: Tensor, mask: int = False) -> Scan:
    """What is not finite in ``tensor``, of any dtype and on any device; see :class:`Scan`."""
    values = tensor.detach()
    parts = 1
    if values.is_complex():
        values, parts = torch.view_as_real(values.resolve_conj()), 2
    # Of what is neither whole numbers nor read here (two numbers of four bits in a byte) nothing can be NaN.
    if not values.is_floating_point() or not values.numel() or not Scan.reads(values.dtype):
        return Scan(torch.float32)
    if not values.is_cpu:
        if values.itemsize > 1 and bool(values.isfinite().all()):
            return Scan(torch.float32)
        values = values.cpu()
    found = Scan(values.dtype, mask)
    whole = as_bytes(values.contiguous().reshape(-1))
    for at in range(0, len(whole), _PIECE):
        found.update(whole[at : at + _PIECE])
    found.first //= parts
    return found


def check_finite(name: str, tensor: Tensor, where: str = "", mask: int | None = None) -> None:
    """Raises:
    CheckpointError: ``tensor`` holds NaN or infinity; says how many, and the first index.

    Args:
        where: the folder or file that it is of. mask: let minus infinity pass; None: where its name is a mask's.
    """
    refuse(name, scan(tensor, infinities_allowed(name) if mask is None else mask), tensor.shape, where)


def check_all_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], where: str = "") -> None:
    """The same of every one of ``tensors``."""
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        check_finite(name, tensor, where)


def refuse(name: str, found: Scan, shape: Iterable[int], where: str = "") -> None:
    """Raises:
    CheckpointError: ``found``, the scan of tensor ``name``, found something.
    """
    if found.count:
        raise CheckpointError(
            f"tensor {name}{f' of {where}' if where else ''}",
            found=said(found, shape),
            do=f"Fetch or mend the checkpoint; {ALLOW}",
        )


def said(found: Scan, shape: Iterable[int]) -> str:
    """How many and where, in words."""
    index = [int(i) for i in np.unravel_index(found.first, tuple(shape) or (1,))]
    return f"NaN or infinity in it, {found.count} in all, the first at {index}"


def infinities_allowed(name: str) -> int:
    """Which infinities a tensor of that name, a mask or a bound, may hold: none (0), minus (1), or both (2)."""
    leaf = name.rpartition(".")[2]
    return 2 if leaf in CLIPS else int(leaf in MASKS)
