"""Operators of onnxruntime over values of 8 and 4 bits, and over stacks of experts: against float64, and broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from support.matrices import TOLERANCE, error
from support.onnx_operators import PAIRS, graph_of, matrix, multiply, open_graph, parts_of
from torch import Tensor

from sparsify.backends.onnx.products.bodies import FORMS, Form, functions_of
from sparsify.runtime.cpu import native
from sparsify.runtime.few_bits import Integers
from sparsify.runtime.layout import Packed, pack, pack_integers

best = native.library()
pytestmark = pytest.mark.skipif(best is None, reason="no kernels here, and no C++ compiler")
FEW = [form for form in FORMS if form.bits is not None]


def packed_of(
    form: Form, rows: int, columns: int, group: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Packed, Tensor]:
    """A packed matrix, and what it stands for: integers times scales, or the values, in float64."""
    if form.bits is None:
        weight = matrix(form.layout, rows, columns, dtype, seed)
        return pack(weight, form.layout), weight.double()
    generator = torch.Generator().manual_seed(seed)
    half = 128 if form.bits == 8 else 8
    kept = (
        matrix(form.layout, rows, columns, torch.float32, seed) != 0 if form.layout != "dense" else torch.tensor(True)
    )
    whole = torch.randint(-half, half, (rows, columns), generator=generator) * kept
    scales = (torch.randn(rows, -(-columns // group), generator=generator) / half).bfloat16().half().to(dtype)
    integers = Integers(whole.to(torch.int8), scales, form.bits, None if group >= columns else group)
    return pack_integers(integers, form.layout), whole * scales.double().repeat_interleave(group, 1)[:, :columns]


def sizes(form: Form, rows: int, columns: int, group: int, exact: bool = False) -> dict[str, int]:
    own = {} if form.bits is None else {"group": min(group, columns), "exact": int(exact)}
    return {"in_features": columns, "out_features": rows} | own


@pytest.mark.first(20)
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(("given", "stored"), [PAIRS[1], PAIRS[3], PAIRS[4]])
@pytest.mark.parametrize("form", FEW, ids=lambda form: form.suffix)
def test_a_product_is_that_of_the_integers_and_their_scales(
    form: Form, given: torch.dtype, stored: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every instruction set, for every number of tokens that takes a way of its own; threads change no bit. Inputs
    that are rounded to 8 bits cost less than a hundredth.
    """
    assert best is not None
    if native.ISAS.index(isa) > best.best_isa:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("SPARSIFY_CPU_ISA", isa)
    for rows, columns, group in ((37, 100, 32), (150, 520, 64), (40, 260, 1 << 20)):
        packed, dense = packed_of(form, rows, columns, group, stored)
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(given)
        for exact in (False, True):
            numbers, parts = sizes(form, rows, columns, group, exact), parts_of(packed, form.layout)
            model = graph_of(f"Linear{form.suffix}", parts | {"bias": bias}, numbers, given)
            one, three = open_graph(model), open_graph(model, threads=3)
            for tokens in (0, 1, 3, 17, 70):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(given)
                y = multiply(one, x)
                assert torch.equal(y, multiply(three, x)) and list(y.shape) == [tokens, rows]
                want = x.double() @ dense.t() + bias.double()
                assert tokens == 0 or error(y, want) < (TOLERANCE[given] if exact else 1e-2)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.suffix)
def test_each_token_meets_its_own_expert(form: Form) -> None:
    rows, columns, group, experts = 40, 100, 32, 5
    packed, dense = packed_of(form, experts * rows, columns, group, torch.bfloat16)
    numbers = sizes(form, rows, columns, group, exact=True) | {"experts": experts}
    stack = dense.view(experts, rows, columns)
    for index in ([], [3], [0, 4, 0, 2, 4], [1] * 30):
        where = torch.tensor(index, dtype=torch.int64)
        parts = {"index": where, **parts_of(packed, form.layout)}
        model = graph_of(f"Experts{form.suffix}", parts, numbers)
        x = torch.randn(len(index), columns, generator=torch.Generator().manual_seed(1))
        want = torch.einsum("tk,tok->to", x.double(), stack[where])
        got = multiply(open_graph(model), x)
        assert list(got.shape) == [len(index), rows]
        assert not index or error(got, want) < 1e-5
        if index:
            model.functions.extend(functions_of(f"Experts{form.suffix}", 23))
            # Rounded to bfloat16, as the checkpoint has it.
            assert error(multiply(open_graph(model, library=False), x), want) < (1e-5 if form.bits is None else 4e-3)


@pytest.mark.parametrize("form", FEW, ids=lambda form: form.suffix)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_onnx_itself_knows_an_operator_by_its_function(form: Form, stored: torch.dtype) -> None:
    """Checked and inferred by onnx, and computed without a library: the checkpoint's values, to the bit."""
    for columns, group in ((100, 32), (260, 128), (40, 1 << 20)):
        packed, dense = packed_of(form, 24, columns, group, stored)
        parts = parts_of(packed, form.layout) | {"bias": torch.zeros(24)}
        model = graph_of(f"Linear{form.suffix}", parts, sizes(form, 24, columns, group))
        model.functions.extend(functions_of(f"Linear{form.suffix}", 23))
        onnx.checker.check_model(model, full_check=True)
        got = multiply(open_graph(model, library=False), torch.eye(columns)).t()
        want = dense.to(stored).float() + 0.0
        assert torch.equal(got, want) and not bool(torch.signbit(got[want == 0]).any())


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def apply(parts: dict[str, Tensor], numbers: dict[str, int]) -> None:
        parts[name] = change(parts[name])

    return apply


def _number(name: str, value: int) -> Callable[..., None]:
    return lambda parts, numbers: numbers.update({name: value})


BROKEN: dict[str, tuple[str, Callable[..., Any], str]] = {
    "a group that is none": ("24Int8", _number("group", 48), "a scale for 48 columns"),
    "a group of nothing": ("24Int8", _number("group", 0), "a scale for 0 columns"),
    "another group": ("24Int4", _number("group", 64), r"scales are not \[40, 4\]"),
    "no group": ("Int8", lambda parts, numbers: numbers.pop("group"), "group"),
    "scales of a row less": ("BitmaskInt8", _changed("scales", lambda s: s[:-1]), r"scales are not \[40, 7\]"),
    "values of a row less": ("Int4", _changed("values", lambda v: v[:-1]), r"values are not \[40, 128\]"),
    "a value less": ("BitmaskInt4", _changed("values", lambda v: v[:-1]), "values for a mask of"),
    "a code that is none": ("24Int4", _changed("codes", torch.zeros_like), "two ascending positions"),
    "scales of another type": ("24Int8", _changed("scales", lambda s: s.to(torch.int32)), "scales|type"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_node_is_refused_by_name(case: str) -> None:
    suffix, change, text = BROKEN[case]
    form = next(form for form in FORMS if form.suffix == suffix)
    packed, _ = packed_of(form, 40, 200, 32, torch.float32)
    parts, numbers = parts_of(packed, form.layout), sizes(form, 40, 200, 32)
    change(parts, numbers)
    with pytest.raises(Exception, match=text):
        open_graph(graph_of(f"Linear{suffix}", parts, numbers))


def test_an_expert_that_is_not_there_is_refused() -> None:
    packed, _ = packed_of(Form("packed24"), 120, 64, 0, torch.float32)
    numbers = {"in_features": 64, "out_features": 40, "experts": 3}
    for index, text in (
        ([0, 3], "a token of expert 3, and there are 3"),
        ([-1, 0], "of expert -1"),
        ([0], r"int64 \[2\]"),
    ):
        parts = {"index": torch.tensor(index), **parts_of(packed, "packed24")}
        with pytest.raises(Exception, match=text):
            multiply(open_graph(graph_of("Experts24", parts, numbers)), torch.randn(2, 64))
    parts = {"index": torch.tensor([0, 1]), **parts_of(packed, "packed24")}
    for experts in (0, -1, 1 << 50, 4):
        with pytest.raises(Exception, match=r"experts|codes are no uint8 \[160, 8\]"):
            open_graph(graph_of("Experts24", parts, numbers | {"experts": experts}))
