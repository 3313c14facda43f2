"""Graphs of one of our operators for onnxruntime: sound ones, ways to make them wrong, and what they should give."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnxruntime as ort
import raw_calls
import torch
from few_calls import sound_few
from onnx import TensorProto, helper
from torch import Tensor

from sparsify.backends.onnx.products.bodies import DOMAIN, OPERATORS, functions_of
from sparsify.runtime.layout import PADDING, pack

KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int16: TensorProto.INT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.float64: TensorProto.DOUBLE,
    torch.bool: TensorProto.BOOL,
}
_NUMBERS = (-(1 << 63), -1, 0, 1, 2, 31, 32, 33, 64, 100, 128, 1 << 31, 1 << 40, 1 << 60, (1 << 63) - 1)


@dataclass(frozen=True)
class Case:
    """``operator`` over ``parts`` with ``sizes``, given ``x``; ``changed``: not as it was made."""

    operator: str
    parts: dict[str, Tensor]
    sizes: dict[str, int]
    x: Tensor
    changed: bool = False

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in self.parts.items()
        )
        return f"{self.operator}(x{list(self.x.shape)}, {parts}; {self.sizes})"


def sound(draw: Random) -> Case:
    """A graph that is right, of any operator, size and number of tokens; x is float32."""
    operator = draw.choice(list(OPERATORS))
    form, experts = OPERATORS[operator], draw.choice((1, 2, 5)) if operator.startswith("Experts") else 0
    rows, columns, tokens = (
        draw.choice((1, 3, 12, 40)),
        draw.choice((1, 63, 64, 130, 300)),
        draw.choice((0, 1, 2, 5, 17, 70)),
    )
    dtype, height = draw.choice((torch.float32, torch.bfloat16, torch.float16)), rows * max(1, experts)
    sizes = {"in_features": columns, "out_features": rows} | ({"experts": experts} if experts else {})
    if form.bits is None:
        weight = torch.randn(height, columns).to(dtype)
        if form.layout == "packed24":
            weight = weight * (torch.arange(columns) % 4 < 2)
        else:
            weight = weight * (torch.rand(height, columns) < draw.choice((0.0, 0.1, 0.9)))
        packed = pack(weight, form.layout)
        parts = {"values": packed.values, "codes": packed.codes.view(torch.uint8)}
    else:
        while True:
            layout, found = sound_few(draw, height, columns, dtype)
            if layout == form.layout and found[-3] == form.bits:
                break
        scales, values, *codes = found[:-3]
        group = found[-2]
        if form.layout == "bitmask":
            # As a file has them; an operator alone does not look there.
            values[-PADDING:] = 0
        parts = {"values": values} | ({"codes": codes[0].view(torch.uint8)} if codes else {}) | {"scales": scales}
        sizes |= {"group": columns if not group or group >= columns else group, "exact": int(found[-1])}
        if group and group >= columns:
            parts["scales"] = scales[:, :1].contiguous()
    if experts:
        parts = {"index": torch.tensor([draw.randrange(experts) for _ in range(tokens)], dtype=torch.int64), **parts}
    elif draw.random() < 0.5:
        parts["bias"] = torch.randn(rows)
    return Case(operator, parts, sizes, torch.randn(tokens, columns))


def changed(draw: Random, case: Case) -> Case:
    """``case`` with an attribute, a tensor or the input changed."""
    chance = draw.random()
    if chance < 0.25:
        name = draw.choice(list(case.sizes))
        sizes = {**case.sizes, name: draw.choice((*_NUMBERS, case.sizes[name] + 1))}
        if draw.random() < 0.1:
            del sizes[name]
        return replace(case, sizes=sizes, changed=True)
    if chance < 0.35:
        x = torch.randn(draw.choice([(3, case.x.shape[-1] + 1), (0,), (2, 2, case.x.shape[-1]), (1, 0)]))
        return replace(case, x=x, changed=True)
    name = draw.choice(list(case.parts))
    parts = dict(case.parts)
    if chance < 0.42:
        del parts[name]
    else:
        change = draw.choice(raw_calls.CONTENT if draw.random() < 0.5 else raw_calls.SHAPE)
        # Where torch does not make such a tensor it stays as it is.
        with contextlib.suppress(RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            made = change(draw, parts[name])
            if (
                isinstance(made, Tensor)
                and made.device.type == "cpu"
                and made.dtype in KINDS
                and made.layout is torch.strided
            ):
                parts[name] = made.detach().resolve_neg().contiguous()
    return replace(case, parts=parts, changed=True) if parts else case


def answer(case: Case, library: Path, threads: int) -> str | None:
    """What is wrong with what onnxruntime makes of ``case``: None where it gives the product, ``refused…`` an error."""
    try:
        (got,) = _session(case, library, threads).run(["y"], {"x": case.x.numpy()})
    except Exception as error:  # onnxruntime's kinds are its own
        return f"refused: {str(error)[:300]}"
    try:
        plain = _session(case, None, 1)
        (want,) = plain.run(["y"], {"x": case.x.numpy()})
    except Exception:
        # What standard operators cannot compute, as of no tokens or past what is there; the sanitizers looked on.
        return None
    if got.shape != want.shape:
        return None if case.changed else f"{got.shape} for {want.shape}"
    sure = np.isfinite(want) & np.isfinite(got)
    scale = float(np.abs(want[sure]).max()) if sure.any() else 0.0
    few = OPERATORS[case.operator].bits is not None
    # Other contents may be anything, sums of huge numbers among it.
    if case.changed or not sure.all() or scale == 0.0 or len(want) == 0:
        return None
    lost, bound = float(np.linalg.norm(got - want)), 3e-2 if few else 1e-5
    if lost <= bound * float(np.linalg.norm(want)):
        return None
    # Beside what such products usually are: the terms of one or two may cancel, the rounding of activations does not.
    others = [plain.run(["y"], {"x": torch.randn(case.x.shape).numpy()})[0] for _ in range(8)]
    off = lost / max(1e-30, *(float(np.linalg.norm(product)) for product in (want, *others)))
    return f"off by {off:.2g}" if off > bound else None


def _session(case: Case, library: Path | None, threads: int) -> Any:
    given = ["x", *case.parts]
    node = helper.make_node(case.operator, given, ["y"], domain=DOMAIN, name="here", **case.sizes)
    constants = [
        helper.make_tensor(
            name, KINDS[t.dtype], list(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes(), raw=True
        )
        if t.numel()
        else helper.make_tensor(name, KINDS[t.dtype], list(t.shape), b"", raw=True)
        for name, t in case.parts.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [f"x{i}" for i in range(case.x.dim())])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    graph = helper.make_graph([node], "graph", [x], [y], constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    else:
        model.functions.extend(functions_of(case.operator, 23))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
