"""Values of which the graph alone tells that they are zero: queries that every layer of a decoder adds to."""

from __future__ import annotations

from torch import fx

from sparsify.ir.operators import operator_name

_MADE = {"zeros", "zeros_like", "new_zeros"}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2}
# Of a zero these are zero again.
_KEPT = {
    "view", "reshape", "_unsafe_view", "expand", "expand_as", "repeat", "clone", "contiguous", "to", "_to_copy",
    "transpose", "permute", "t", "unsqueeze", "squeeze", "slice", "select", "flatten", "alias", "detach", "dropout",
}  # fmt: skip


def always_zero(node: fx.Node) -> bool:
    """Whether ``node`` is zero whatever the model is given and whatever its weights are."""
    while node.op == "call_function":
        name = operator_name(node)
        if name in _MADE:
            return True
        if name in _FILLED:
            return len(node.args) > _FILLED[name] and node.args[_FILLED[name]] in (0, 0.0, False)
        if name not in _KEPT or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return False
