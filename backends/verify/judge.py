"""Whether a weight holds its pattern along the axis that is summed over."""

from __future__ import annotations

from torch import Tensor

from sparsify.backends.verify.axis import SummedAxis
from sparsify.backends.verify.promises import Promise
from sparsify.backends.verify.result import Verification, WeightCheck
from sparsify.files.manifest import MANIFEST
from sparsify.method.pattern import NM, Pattern
from sparsify.method.selection import LEAST_ZEROS, nm_most

# Patterns that are looked for where none is promised.
_KNOWN = (NM(1, 4), NM(2, 4), NM(4, 8))


def judge(
    result: Verification,
    at: SummedAxis,
    weight: Tensor,
    stored: str,
    promise: Promise | None,
    asked: Pattern | None,
) -> WeightCheck:
    """Check one weight along the axis that is summed over; what is wrong goes to ``result.problems``."""
    moved = weight.movedim(at.axis, -1)
    zeros = float((weight == 0).float().mean())
    held = next((p for p in _KNOWN if zeros > 0.25 and _holds(moved, p)), None)
    expected = asked if asked is not None and zeros >= LEAST_ZEROS else promise.pattern if promise is not None else None
    kept = isinstance(expected, NM) and _holds(moved, expected)
    if isinstance(expected, NM) and not kept:
        result.problems.append(_broken(at, weight, expected))
    elif not isinstance(expected, NM) and promise is not None and zeros + 1e-6 < 1 - promise.kept:
        result.problems.append(f"{at.name}: {zeros:.4%} zeros, {MANIFEST} says {1 - promise.kept:.4%}")
    elif expected is None and held is None and zeros > 0.25 and (turned := _turned(at, weight)) is not None:
        result.problems.append(turned)
    return WeightCheck(
        at.name,
        tuple(weight.shape),
        str(weight.dtype).removeprefix("torch."),
        stored,
        at.operator,
        at.axis,
        zeros,
        str(expected if kept else held) if kept or held else None,
        tensorrt=_tensorrt(at, moved, held),
    )


def _broken(at: SummedAxis, weight: Tensor, expected: NM) -> str:
    other = _other_axis(weight, at.axis, expected)
    found = f"{at.name}: {expected} does not hold along axis {at.axis}, which {at.operator} sums over"
    return found if other is None else f"{found}; it holds along axis {other}: pruned along the wrong axis"


def _turned(at: SummedAxis, weight: Tensor) -> str | None:
    """Whether a pattern that nobody promised holds along another axis: what a tool that knows no axis would do."""
    for known in _KNOWN:
        if (other := _other_axis(weight, at.axis, known)) is not None:
            summed = f"{at.operator} sums over axis {at.axis}: pruned along the wrong axis"
            return f"{at.name}: {known} holds along axis {other}, but {summed}"
    return None


def _holds(moved: Tensor, pattern: NM) -> bool:
    """Whether each group of M along the last axis keeps at most N."""
    return nm_most(moved, pattern.m) <= pattern.n


def _other_axis(weight: Tensor, axis: int, pattern: NM) -> int | None:
    return next((a for a in range(weight.dim()) if a != axis and _holds(weight.movedim(a, -1), pattern)), None)


def _tensorrt(at: SummedAxis, moved: Tensor, held: NM | None) -> str | None:
    """Why TensorRT's sparse kernels do not take it; None where they may."""
    if held is None or (held.n * 4 > 2 * held.m) or held.m > 4:
        return "not 2:4"
    if not at.flat:
        return f"{at.operator} of more than two dimensions"
    outputs, inputs = moved.reshape(-1, moved.shape[-1]).shape
    if inputs % 16 or outputs % 8:
        return f"{inputs} inputs × {outputs} outputs are not multiples of 16 and 8"
    return None
