"""Arithmetic that does nothing, taken out: sums with zero, products with one.

onnxscript's rules of the same names take 1e-8 for zero and 1.000009 for one; 1e-8 is what keeps a norm from dividing by
zero.
"""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.pattern import Constant


def _exactly(number: float) -> Constant:
    return Constant(number, rel_tol=0.0, abs_tol=0.0)


def _add_0(op: Any, x: Any) -> Any:
    return op.Add(x, _exactly(0))


def _sub_0(op: Any, x: Any) -> Any:
    return op.Sub(x, _exactly(0))


def _mul_by_1(op: Any, x: Any) -> Any:
    return op.Mul(x, _exactly(1))


def _div_by_1(op: Any, x: Any) -> Any:
    return op.Div(x, _exactly(1))


def _itself(op: Any, x: Any, **_: Any) -> Any:
    return op.Identity(x)


IDENTITIES = [RewriteRule(pattern, _itself) for pattern in (_add_0, _sub_0, _mul_by_1, _div_by_1)]
