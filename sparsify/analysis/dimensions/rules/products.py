"""Rules of operators that multiply and add over a dimension."""

from __future__ import annotations

import numpy
from torch import fx

from sparsify.analysis.dimensions.rules.common import broadcast, pinned
from sparsify.analysis.dimensions.walk import Row, Rows, Walk
from sparsify.ir.operators import argument, shape_of


def linear(walk: Walk, node: fx.Node) -> Rows:
    x, weight, bias = walk.of(node.args[0]), walk.of(node.args[1]), walk.of(argument(node, 2, "bias"))
    walk.same(x[-1], weight[-1], f"{node.name} sums over what is no parameter")
    if len(weight) == 1:  # one output neuron, without a dimension of its own
        return x[:-1]
    out = weight[0]
    if bias:
        out = walk.same(out, bias[0], f"{node.name} adds what is no parameter")
    return [*x[:-1], out]


def addmm(walk: Walk, node: fx.Node) -> Rows:
    added, x, w = (walk.of(a) for a in node.args[:3])
    walk.same(x[1], w[0], f"{node.name} sums over what is no parameter")
    out = w[1]
    if added:
        out = walk.same(out, added[-1], f"{node.name} adds what is no parameter")
    return [x[0], out]


def matmul(walk: Walk, node: fx.Node) -> Rows:
    """mm, bmm, matmul: batches alike, and the last dimension of one with the last but one of the other."""
    left, right = argument(node, 0), argument(node, 1)
    a, b = walk.of(left), walk.of(right)
    if len(a) < 2 or len(b) < 2:
        return pinned(walk, node)
    walk.same(a[-1], b[-2], f"{node.name} sums over what is no parameter")
    return [*broadcast(walk, [left, right], node, drop=2), a[-2], b[-1]]


def baddbmm(walk: Walk, node: fx.Node) -> Rows:
    added, left, right = (argument(node, place) for place in range(3))
    a, b = walk.of(left), walk.of(right)
    walk.same(a[-1], b[-2], f"{node.name} sums over what is no parameter")
    rows = [*broadcast(walk, [left, right], node, drop=2), a[-2], b[-1]]
    for at, (row, size) in enumerate(zip(walk.of(added), shape_of(added), strict=True)):
        if size > 1:
            rows[at] = walk.same(rows[at], row, f"{node.name} adds what is no parameter")
    return rows


def einsum(walk: Walk, node: fx.Node) -> Rows:
    equation, operands = argument(node, 0), argument(node, 1)
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    if "." in inputs or not output:
        return pinned(walk, node)
    letters: dict[str, Row | None] = {}
    for names, operand in zip(inputs.split(","), operands, strict=True):
        for letter, row, size in zip(names, walk.of(operand), shape_of(operand), strict=True):
            if size > 1:
                met = letters.get(letter, row)
                letters[letter] = walk.same(met, row, f"{node.name} meets it with what is no parameter")
    return [letters.get(letter) for letter in output]


def attention(walk: Walk, node: fx.Node) -> Rows:
    """Queries [batch, heads, …] with keys and values, of fewer heads where each serves several queries."""
    query, key, value = (list(walk.of(a)) for a in node.args[:3])
    heads, fewer = shape_of(node.args[0])[1], shape_of(node.args[1])[1]
    found = query[1]
    for rows, source in ((key, node.args[1]), (value, node.args[2])):
        if shape_of(source)[1] == 1:
            continue
        row = rows[1]
        if row is not None and fewer != heads:
            row = row.made(numpy.repeat(row.ids, heads // fewer))
        found = walk.same(found, row, f"{node.name} meets it with what is no parameter")
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node) and len(shape_of(mask)) == 4 and shape_of(mask)[1] != 1:
        found = walk.same(found, walk.of(mask)[1], f"{node.name} adds a bias for each head that is no parameter")
    walk.same(query[3], key[3], f"{node.name} sums over what is no parameter")
    return [query[0], found, query[2], value[3]]


def convolution(walk: Walk, node: fx.Node) -> Rows:
    x, weight, bias = walk.of(node.args[0]), walk.of(node.args[1]), walk.of(argument(node, 2, "bias"))
    groups, size = int(argument(node, 6, "groups", 1)), shape_of(node.args[1])
    out = weight[0]
    if groups == 1:
        walk.same(x[1], weight[1], f"{node.name} sums over what is no parameter")
    elif groups == size[0] and size[1] == 1:
        # One small kernel for each channel.
        out = walk.same(x[1], weight[0], f"{node.name} meets it with what is no parameter")
    else:
        for row in (x[1], weight[0], weight[1]):
            walk.pin(row, f"{node.name} convolves in groups of channels")
    for row in weight[2:]:
        walk.pin(row, f"{node.name} slides it over the input")
    if bias:
        out = walk.same(out, bias[0], f"{node.name} adds what is no parameter")
    return [x[0], out, *[None] * (len(size) - 2)]


def grouped(walk: Walk, node: fx.Node) -> Rows:
    """Tokens sorted by expert, each with its expert's matrix [experts, in, out]."""
    x, weight, ends = (walk.of(a) for a in node.args[:3])
    walk.same(ends[0], weight[0], f"{node.name} gives every expert its tokens by number")
    walk.same(x[-1], weight[-2], f"{node.name} sums over what is no parameter")
    return [x[0], weight[-1]]
