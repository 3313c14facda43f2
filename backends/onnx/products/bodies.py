"""What our operators compute, in standard ones: functions of the file, for whoever has no library of ours.

``docs/format.md`` describes the packed matrices, ``docs/onnx.md`` the operators.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx

from sparsify.runtime.words import Layout

DOMAIN = "sparsify"
_LAYOUTS: dict[Layout, str] = {"packed24": "24", "bitmask": "Bitmask", "dense": ""}
_BITS = {None: "", 8: "Int8", 4: "Int4"}


class Form(NamedTuple):
    """How a weight lies in the file: its layout, and the bits of its values (None: they are of full width)."""

    layout: Layout
    bits: int | None = None

    @property
    def suffix(self) -> str:
        """What the names of its operators end with."""
        return _LAYOUTS[self.layout] + _BITS[self.bits]

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that its operators read, in their order."""
        codes = () if self.layout == "dense" else ("codes",)
        return ("values", *codes, *(() if self.bits is None else ("scales",)))


FORMS = tuple(Form(layout, bits) for layout in _LAYOUTS for bits in _BITS if bits is not None or layout != "dense")
LINEAR = {f"Linear{form.suffix}": form for form in FORMS}
EXPERTS = {f"Experts{form.suffix}": form for form in FORMS}
# Every operator of ours.
OPERATORS = LINEAR | EXPERTS


def functions_of(operator: str, opset: int) -> list[onnx.FunctionProto]:
    """What ``operator`` computes, in standard operators; and what that calls."""
    form = OPERATORS[operator]
    given, sizes = ", ".join(form.parts), ["in_features"]
    if form.bits is not None:
        sizes.append("group")
    own = [*sizes, "out_features", *(["exact"] if form.bits is not None else [])]
    declared = ", ".join(f"{name}: int" for name in sizes)
    unpack = "\n".join(
        (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>',
            f"Unpack{form.suffix} <{declared}> ({given}, like) => (weight) {{",
            _CONSTANTS,
            _numbers(form),
            _PLACED[form.layout].format(few=_NIBBLES if form.bits == 4 else _ONE_BY_ONE),
            _WIDTH.format(rows="scales" if form.layout == "dense" else "codes"),
            _WHOLE if form.bits is None else _SCALED,
            "}",
        )
    )
    experts = operator in EXPERTS
    declared = ", ".join(f"{name}: int" for name in [*own, *(["experts"] if experts else [])])
    inputs = ["x", "index", given] if experts else ["x", given, "bias"]
    handed = ", ".join(f"{name}: int = @{name}" for name in sizes)
    product = "\n".join(
        (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : 1]>',
            f"{operator} <{declared}> ({', '.join(inputs)}) => (y) {{",
            f"  weight = {DOMAIN}.Unpack{form.suffix} <{handed}> ({given}, x)",
            _EXPERTS if experts else "  y = Gemm <transB = 1> (x, weight, bias)",
            "}",
        )
    )
    return [onnx.parser.parse_function(text) for text in (unpack, product)]


_CONSTANTS = """
  first = Constant <value = int64[1] {0}> ()
  second = Constant <value = int64[1] {1}> ()
  rest = Constant <value = int64[1] {-1}> ()
  column = Constant <value = int64[2] {-1, 1}> ()
  none = Constant <value = float[1] {0.0}> ()
"""


def _numbers(form: Form) -> str:
    """``numbers``: the values as numbers, flat where two lie in a byte; ``zero``: one like them."""
    if form.bits is None:
        return "  numbers = CastLike (values, like)\n  zero = CastLike (none, like)"
    if form.bits == 8:
        return "  numbers = Cast <to = 1> (values)\n  zero = Identity (none)"
    # Two's complement: the first in the low nibble.
    return """
  fifteen = Constant <value = uint8[1] {15}> ()
  upper = Constant <value = uint8[1] {240}> ()
  eight = Constant <value = uint8[1] {8}> ()
  by = Constant <value = uint8[1] {4}> ()
  off = Constant <value = float[1] {8.0}> ()
  low = BitwiseAnd (values, fifteen)
  above_ = BitwiseAnd (values, upper)
  high = BitShift <direction = "RIGHT"> (above_, by)
  lows = Reshape (low, column)
  highs = Reshape (high, column)
  both = Concat <axis = 1> (lows, highs)
  turned = BitwiseXor (both, eight)
  above = Cast <to = 1> (turned)
  signed = Sub (above, off)
  numbers = Reshape (signed, rest)
  zero = Identity (none)
"""


# Two values of every four, at the positions that two bits each name. Masked before they are shifted: OpenVINO shifts
# right by a division that rounds, which is exact only of multiples; so are nibbles.
_PAIRS = """
  bytes = Reshape (codes, column)
  shifts = Constant <value = uint8[4] {{0, 2, 4, 6}}> ()
  twos = Constant <value = uint8[4] {{3, 12, 48, 192}}> ()
  pairs = Constant <value = int64[2] {{-1, 2}}> ()
  two = BitwiseAnd (bytes, twos)
  shifted = BitShift <direction = "RIGHT"> (two, shifts)
  places = Reshape (shifted, pairs)
  at = Cast <to = 6> (places)
  kept = Reshape (numbers, pairs)
  groups = Shape <start = 0, end = 1> (kept)
  four = Constant <value = int64[1] {{4}}> ()
  size = Concat <axis = 0> (groups, four)
  zeros = Expand (zero, size)
  flat = ScatterElements <axis = 1> (zeros, at, kept)
"""
# A weight is the value whose number is that of the bits before its own, or the last one, which is a zero.
_MASK = """
  bytes = Reshape (codes, column)
  powers = Constant <value = uint8[8] {{1, 2, 4, 8, 16, 32, 64, 128}}> ()
  masked = BitwiseAnd (bytes, powers)
  bits = Cast <to = 9> (masked)
  line = Reshape (bits, rest)
  ones = Cast <to = 6> (line)
{few}
  count = Shape (numbers)
  last = Sub (count, second)
  last_ = Cast <to = 6> (last)
  at = Where (line, before, last_)
  flat = Gather <axis = 0> (numbers, at)
"""
_ONE_BY_ONE = """
  axis = Constant <value = int64 {0}> ()
  before = CumSum <exclusive = 1> (ones, axis)
"""
# The values of each 64 columns take whole bytes, of two values each.
_NIBBLES = """
  blocks = Constant <value = int64[2] {-1, 64}> ()
  along = Constant <value = int64 {1}> ()
  down = Constant <value = int64 {0}> ()
  one = Constant <value = int32 {1}> ()
  each = Reshape (ones, blocks)
  within = CumSum <exclusive = 1> (each, along)
  held = ReduceSum <keepdims = 1> (each, second)
  odd = BitwiseAnd (held, one)
  taken = Add (held, odd)
  begin = CumSum <exclusive = 1> (taken, down)
  place = Add (within, begin)
  before = Reshape (place, rest)
"""
_ALL = "  flat = Identity (numbers)"
_PLACED: dict[Layout, str] = {"packed24": _PAIRS, "bitmask": _MASK, "dense": _ALL}
_WIDTH = """
  rows = Shape <start = 0, end = 1> ({rows})
  padded = Concat <axis = 0> (rows, rest)
  all = Reshape (flat, padded)
  columns = Constant <value_int: int = @in_features> ()
  columns_ = Reshape (columns, rest)
  some = Slice (all, first, columns_, second)
"""
_WHOLE = "  weight = Identity (some)"
# Rounded as the checkpoint's dtype rounds. Zero times a negative scale would be -0.0.
_SCALED = """
  from = Constant <value = int64 {0}> ()
  step = Constant <value = int64 {1}> ()
  shared = Constant <value_int: int = @group> ()
  numbered = Range (from, columns, step)
  group_of = Div (numbered, shared)
  floats = Cast <to = 1> (scales)
  each_scale = Gather <axis = 1> (floats, group_of)
  times = Mul (some, each_scale)
  is_kept = Cast <to = 9> (some)
  exact_ = Where (is_kept, times, none)
  rounded = CastLike (exact_, scales)
  weight = CastLike (rounded, like)
"""
_EXPERTS = """
  rest = Constant <value = int64[1] {-1}> ()
  out = Constant <value_int: int = @out_features> ()
  out_ = Reshape (out, rest)
  columns = Constant <value_int: int = @in_features> ()
  columns_ = Reshape (columns, rest)
  stack = Concat <axis = 0> (rest, out_, columns_)
  matrices = Reshape (weight, stack)
  chosen = Gather <axis = 0> (matrices, index)
  tokens = Unsqueeze (x, rest)
  products = MatMul (chosen, tokens)
  y = Squeeze (products, rest)
"""
