"""An ONNX graph made wrong as the message that it is: fields of other values, nodes and tensors gone or doubled."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import onnx

_NUMBERS = (0, 1, -1, 2, 3, 7, 64, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 62))
_WORDS = ("", "a", "MatMul", "Transpose", "Loop", "NoSuchOp", "\x1b[31mred", "../../etc/passwd", "/dev/zero", "x" * 400)


def spoil_graph(path: Path, random: Random) -> None:
    """Change one to three things of the graph in ``path``."""
    model = onnx.load(path, load_external_data=False)
    for _ in range(random.choice((1, 1, 2, 3))):
        _spoil_one(model, random)
    path.write_bytes(model.SerializePartialToString())


def _spoil_one(model: Any, random: Random) -> None:
    graph = model.graph
    parts = [
        [message]
        for message in (
            random.choice(list(graph.node) or [graph]),
            random.choice(list(graph.initializer) or [graph]),
            random.choice([*graph.input, *graph.output, *graph.value_info] or [graph]),
            model,
        )
    ]
    message: Any = random.choice(parts)[0]
    # Down to a random field.
    while True:
        fields = message.DESCRIPTOR.fields
        field = random.choice(fields)
        if field.name == "graph":
            continue
        repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
        value = getattr(message, field.name)
        if field.type == field.TYPE_MESSAGE:
            inner = list(value) if repeated else [value]
            if inner and random.random() < 0.8:
                message = random.choice(inner)
                continue
            if repeated and inner:
                _longer_or_shorter(value, random, None)
            return
        if repeated:
            _longer_or_shorter(value, random, _value(field, random))
            if len(value) and random.random() < 0.6:
                value[random.randrange(len(value))] = _value(field, random)
        else:
            setattr(message, field.name, _value(field, random))
        return


def _longer_or_shorter(values: Any, random: Random, another: Any) -> None:
    """``another`` at the end of a list (an empty message where it is None), or one thing out of it."""
    how = random.randrange(3)
    if how == 0 and len(values):
        del values[random.randrange(len(values))]
    elif how == 1 and another is None:
        values.add()
    elif how == 1:
        values.append(another)


def _value(field: Any, random: Random) -> Any:
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        return random.choice(_WORDS) if field.type == field.TYPE_STRING else random.randbytes(random.choice((0, 1, 64)))
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return random.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    number = random.choice(_NUMBERS)
    if kind == field.CPPTYPE_ENUM:
        return random.choice(field.enum_type.values).number
    if kind == field.CPPTYPE_INT32:
        return random.randrange(-2, 32)
    return abs(number) if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else number
