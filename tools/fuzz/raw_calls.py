"""Calls of the operators: sound ones, what plain torch gives for them, and ways to make them wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import few_calls
import torch
from few_calls import FEW, NUMBERS, sound_few
from torch import Tensor
from torch.nn.functional import linear

from sparsify.runtime import ops, reference
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.layout import PADDING, Packed
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import Layout

_FULL_WIDTH = (ops.linear_24, ops.linear_bitmask, ops.experts_24, ops.experts_bitmask, ops.linear_dense)
OPERATORS: tuple[Callable[..., Any], ...] = (*_FULL_WIDTH, *few_calls.OPERATORS)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = (1, 2, 3, 5, 12, 33, 40)
_COLUMNS = (1, 3, 8, 63, 64, 65, 128, 200, 256, 1100)
_TOKENS = (0, 1, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 40, 64, 65, 130)


@dataclass(frozen=True)
class Call:
    """``operator(*arguments)``; ``truth`` of the same arguments is plain torch's answer (None: there is none)."""

    operator: Callable[..., Any]
    truth: Callable[..., Any] | None
    arguments: list[Any]

    def __str__(self) -> str:
        return f"{self.operator}({', '.join(map(_described, self.arguments))})"


def sound_call(draw: Random) -> Call:
    """A call that is right, of any operator, dtype, size and number of tokens."""
    dtype, rows, columns = draw.choice(_FLOATS), draw.choice(_ROWS), draw.choice(_COLUMNS)
    tokens = draw.choice(_TOKENS)
    x = torch.randn(draw.choice([(tokens, columns), (1, tokens, columns)])).to(dtype)
    bias = draw.choice((None, torch.randn(rows).to(dtype)))
    kind = draw.choice(("linear", "linear", "linear", "linear", "experts", "dense", "unpack", "few", "few", "few"))
    if kind == "few":
        return _few_call(draw, x, rows, bias)
    if kind == "dense":
        one = x[..., :1, :] if draw.random() < 0.7 else x
        return Call(ops.linear_dense, linear, [one, torch.randn(rows, columns).to(dtype), bias])
    layout: Layout = draw.choice(("packed24", "bitmask"))
    packed24 = layout == "packed24"
    if kind == "experts":
        experts = draw.choice((1, 2, 5))
        packed = _packed(draw, (experts, rows, columns), layout, dtype)
        x = x.reshape(-1, columns)
        ends = sorted(draw.randint(0, len(x)) for _ in range(experts))
        offsets = torch.tensor(ends, dtype=draw.choice((torch.int32, torch.int64)))
        grouped = reference.experts_24 if packed24 else _experts_bitmask
        return Call(packed.operator, grouped, [x, *packed.tensors.values(), offsets])
    packed = _packed(draw, (rows, columns), layout, dtype)
    if kind == "unpack":
        return Call(_unpacking(layout), None, list(packed.tensors.values()))
    truth = reference.linear_24 if packed24 else reference.linear_bitmask
    return Call(packed.operator, truth, [x, *packed.tensors.values(), bias])


def _few_call(draw: Random, x: Tensor, rows: int, bias: Tensor | None) -> Call:
    """A product with values of 8 or 4 bits, of one matrix or a stack, or a matrix made dense."""
    columns, chance = x.shape[-1], draw.random()
    experts = draw.choice((1, 2, 5)) if chance < 0.2 else 0
    layout, rest = sound_few(draw, rows, columns, x.dtype, experts)
    linear_few, experts_few, truth, experts_truth = FEW[layout]
    if chance > 0.9:
        return Call(few_calls.unpacking(layout, columns), None, rest)
    if not experts:
        return Call(linear_few, truth, [x, *rest, bias])
    x = x.reshape(-1, columns)
    ends = sorted(draw.randint(0, len(x)) for _ in range(experts))
    return Call(experts_few, experts_truth, [x, *rest, torch.tensor(ends)])


def mutated(draw: Random, call: Call) -> Call:
    """``call`` with one of its tensors changed, swapped with another, or left out, or one of its numbers changed."""
    out = list(call.arguments)
    numbers = [i for i, a in enumerate(out) if isinstance(a, int)]
    if numbers and draw.random() < 0.1:
        out[draw.choice(numbers)] = draw.choice(NUMBERS)
        return Call(call.operator, call.truth, out)
    places = [i for i, a in enumerate(out) if isinstance(a, Tensor)]
    place = draw.choice(places)
    chance = draw.random()
    if chance < 0.05:
        other = draw.choice(places)
        out[place], out[other] = out[other], out[place]
    elif chance < 0.1 and call.operator in OPERATORS:
        # A schema lets None pass for any tensor.
        out[place] = None
    else:
        change = draw.choice(CONTENT if draw.random() < 0.5 else SHAPE)
        # Where torch does not make such a tensor it stays as it is.
        with contextlib.suppress(RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            out[place] = change(draw, out[place])
    return Call(call.operator, call.truth, out)


def _packed(draw: Random, shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> PackedWeight:
    weight = torch.randn(shape)
    if layout == "bitmask":
        return PackedWeight.of((weight * (torch.rand(shape) < draw.choice((0.0, 0.01, 0.5, 0.9)))).to(dtype), layout)
    kept = torch.rand(*shape[:-1], -(-shape[-1] // 4), 4).topk(2, dim=-1).indices
    mask = torch.zeros(*kept.shape[:-1], 4).scatter_(-1, kept, 1.0).flatten(-2)[..., : shape[-1]]
    return PackedWeight.of((weight * mask).to(dtype), layout)


def _experts_bitmask(x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, offsets: Tensor) -> Tensor:
    """The reference of each expert that has tokens: of the others nothing is read, whatever lies there."""
    rows, begin = mask.shape[1], 0
    parts = [x.new_empty(0, rows)]
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            own = starts[expert * rows : (expert + 1) * rows + 1]
            held = torch.cat([values[int(own[0]) : int(own[-1])], values.new_zeros(PADDING)])
            parts.append(reference.linear_bitmask(x[begin:end], held, mask[expert], own - own[0]))
        begin = end
    parts.append(x.new_zeros(len(x) - begin, rows))
    return torch.cat(parts)


def _unpacking(layout: Layout) -> Callable[..., Tensor]:
    """Unpack a matrix through the library, by the shape that its codes have."""

    def unpack(values: Tensor, codes: Tensor, starts: Tensor | None = None) -> Tensor:
        width = codes.shape[1] * (8 if layout == "packed24" else 32) if codes.dim() > 1 else 64
        return unpacked(Packed(layout, (len(codes) if codes.dim() else 1, width), values, codes), starts)

    return unpack


def _described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')}{list(argument.shape)}"
    return repr(argument)


# ---- other contents


def _filled(draw: Random, tensor: Tensor) -> Tensor:
    """Other numbers in some places, as bad as the dtype has them."""
    tensor = tensor.clone()
    flat = tensor.view(-1)
    for _ in range(draw.choice((1, 1, 3, 20)) if flat.numel() else 0):
        at = draw.choice((0, flat.numel() - 1, draw.randrange(flat.numel())))
        if tensor.dtype.is_floating_point:
            flat[at] = draw.choice((float("nan"), float("inf"), -float("inf"), 0.0, 1.0))
        elif tensor.dtype is torch.bool:
            flat[at] = True
        else:
            info = torch.iinfo(tensor.dtype)
            near = int(flat[at]) + draw.choice((-64, -1, 1, 7, 64, 10**6))
            flat[at] = draw.choice((info.min, info.max, 0, min(max(near, info.min), info.max), draw.randint(0, 127)))
    return tensor


def _random_bits(draw: Random, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point:
        return torch.randn_like(tensor)
    info = torch.iinfo(tensor.dtype)
    numbers = [draw.randint(info.min, info.max) for _ in range(tensor.numel())]
    return torch.tensor(numbers, dtype=tensor.dtype).view_as(tensor)


def _unaligned(draw: Random, tensor: Tensor) -> Tensor:
    raw = bytearray(b"\0" * draw.randint(1, 3)) + bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    skip = len(raw) - tensor.nbytes
    return torch.frombuffer(raw, dtype=tensor.dtype, offset=skip, count=tensor.numel()).view(tensor.shape)


def _changed_in_place(draw: Random, tensor: Tensor) -> Tensor:
    return tensor.copy_(_random_bits(draw, tensor) if draw.random() < 0.5 else _filled(draw, tensor))


CONTENT: tuple[Callable[[Random, Tensor], Tensor], ...] = (
    _filled,
    _filled,
    _random_bits,
    _changed_in_place,
    _unaligned,
    lambda _, t: t.flip(0),
    lambda _, t: t.roll(1, -1),
    lambda _, t: t + 1,
    lambda _, t: t * 0,
)

# ---- other shapes, dtypes, strides and places


def _cast(draw: Random, tensor: Tensor) -> Tensor:
    others = (torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
    return tensor.to(draw.choice((*_FLOATS, *others, torch.complex64)))


def _viewed(draw: Random, tensor: Tensor) -> Tensor:
    return tensor.view(draw.choice((torch.uint8, torch.int16, torch.int32, torch.int64, *_FLOATS)))


SHAPE: tuple[Callable[[Random, Tensor], Tensor], ...] = (
    _cast,
    _viewed,
    lambda _, t: torch._neg_view(-t),
    lambda draw, t: t[: draw.randint(0, max(0, t.shape[0] - 1))],
    lambda draw, t: t[..., : draw.randint(0, max(0, t.shape[-1] - 1))],
    lambda draw, t: t[draw.randint(0, 2) :],
    lambda draw, t: t.repeat(*[draw.randint(1, 3) for _ in t.shape]),
    lambda draw, t: t.unsqueeze(draw.choice((0, -1))),
    lambda _, t: t.reshape(-1),
    lambda _, t: t.reshape(()) if t.numel() == 1 else t[0],
    lambda _, t: t.transpose(0, -1),
    lambda _, t: t.transpose(0, -1).contiguous().transpose(0, -1),
    lambda _, t: t[..., ::2],
    lambda _, t: t[:1].expand(t.shape),
    lambda _, t: t.as_strided((7, 64), (0, 1)),
    lambda draw, t: t.new_zeros(draw.choice(((0,), (0, 64), (64, 0), (1, 64), (1 << 16,)))),
    lambda _, t: t.to("meta"),
    lambda _, t: t.to_sparse(),
    lambda _, t: t.requires_grad_(True),
)
