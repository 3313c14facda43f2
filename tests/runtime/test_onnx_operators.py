"""The library that onnxruntime is given: its operators against float64, and what it says of broken graphs."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support.matrices import TOLERANCE, error
from support.onnx_operators import NAMES, PAIRS, graph_of, matrix, multiply, open_graph, parts_of
from torch import Tensor

import sparsify
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.build import SOURCES, find_compiler
from sparsify.runtime.words import LAYOUTS, Layout

best = native.library()
pytestmark = pytest.mark.skipif(best is None, reason="no kernels here, and no C++ compiler")


def sizes(weight: Tensor) -> dict[str, int]:
    return {"in_features": weight.shape[1], "out_features": weight.shape[0]}


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(("given", "stored"), PAIRS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_is_that_of_the_dense_matrix(
    layout: Layout, given: torch.dtype, stored: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every instruction set, for every number of tokens that takes a way of its own; threads change no bit."""
    assert best is not None
    if native.ISAS.index(isa) > best.best_isa:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("SPARSIFY_CPU_ISA", isa)
    for rows, columns in ((37, 100), (300, 1088)):
        weight = matrix(layout, rows, columns, stored)
        parts = parts_of(weight, layout)
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(given)
        for more in ({}, {"bias": bias}):
            model = graph_of(layout, parts | more, sizes(weight), given)
            one, three = open_graph(model), open_graph(model, threads=3)
            for tokens in (0, 1, 2, 5, 17, 70, 130):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(given)
                y = multiply(one, x)
                assert torch.equal(y, multiply(three, x)) and list(y.shape) == [tokens, rows]
                exact = x.double() @ weight.double().t() + (bias.double() if more else 0)
                assert tokens == 0 or error(y, exact) < TOLERANCE[given]


def test_a_pruned_weight_meets_infinity_as_a_zero_does() -> None:
    for layout in LAYOUTS:
        weight = matrix(layout, 16, 64, torch.bfloat16)
        session = open_graph(graph_of(layout, parts_of(weight, layout), sizes(weight)))
        for tokens in (1, 20):
            x = torch.zeros(tokens, 64)
            x[-1, 5] = torch.inf
            # Summed in another order, infinity is where it was.
            assert torch.equal(multiply(session, x).isnan(), (x @ weight.float().t()).isnan())


def _broken() -> dict[str, tuple[Layout, Callable[[dict[str, Tensor], dict[str, int]], dict[str, Any] | None], str]]:
    """What is wrong with a graph, and what of the message names it."""

    def parts(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def apply(parts: dict[str, Tensor], sizes: dict[str, int]) -> None:
            parts[name] = change(parts[name])

        return apply

    def attribute(name: str, value: int | None) -> Callable[..., dict[str, Any]]:
        def apply(parts: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Any]:
            sizes.pop(name)
            if value is not None:
                sizes[name] = value
            return {"width": 128}

        return apply

    def free(name: str) -> Callable[..., dict[str, Any]]:
        return lambda parts, sizes: {"free": name}

    def flip(codes: Tensor) -> Tensor:
        codes = codes.clone()
        codes[3, 2] ^= 1
        return codes

    return {
        "no in_features": ("packed24", attribute("in_features", None), "in_features"),
        "no out_features": ("bitmask", attribute("out_features", None), "out_features"),
        "no columns": ("packed24", attribute("in_features", 0), "in_features 0"),
        "rows below zero": ("bitmask", attribute("out_features", -1), "out_features -1"),
        "rows past all memory": ("packed24", attribute("out_features", 1 << 62), "out_features 4611686018427387904"),
        "columns past all memory": ("bitmask", attribute("in_features", 1 << 50), "in_features 1125899906842624"),
        "more columns": ("packed24", attribute("in_features", 192), r"codes are no uint8 \[40, 24\]"),
        "more rows": ("bitmask", attribute("out_features", 41), r"codes are no uint8 \[41, 16\]"),
        "codes of another shape": ("packed24", parts("codes", lambda c: c.view(-1)), "codes are no uint8"),
        "codes of another type": ("bitmask", parts("codes", lambda c: c.view(torch.int32)), "codes|type"),
        "a row of values less": ("packed24", parts("values", lambda v: v[:-1]), r"values are not \[40, 64\]"),
        "values of one dimension": ("packed24", parts("values", lambda v: v.view(-1)), "values are not"),
        "no values": ("packed24", parts("values", lambda v: v[:0]), "values are not"),
        "one value less": ("bitmask", parts("values", lambda v: v[:-1]), "values for a mask of"),
        "one value more": ("bitmask", parts("values", lambda v: torch.cat([v, v[:1]])), "values for a mask of"),
        "values of two dimensions": ("bitmask", parts("values", lambda v: v[None]), "its values have 2 dimensions"),
        "a bit more": ("bitmask", parts("codes", flip), "values for a mask of"),
        "a code that is none": ("packed24", parts("codes", lambda c: torch.zeros_like(c)), "two ascending positions"),
        "codes from outside": ("packed24", free("codes"), "codes are no constant"),
        "values from outside": ("bitmask", free("values"), "values are no constant"),
    }


@pytest.mark.parametrize("case", _broken())
def test_a_broken_node_is_refused_by_name_when_a_session_is_made(case: str) -> None:
    layout, change, text = _broken()[case]
    weight = matrix(layout, 40, 128, torch.float32)
    parts, numbers = parts_of(weight, layout), sizes(weight)
    more = change(parts, numbers) or {}
    with pytest.raises(Exception, match=text) as refused:
        open_graph(graph_of(layout, parts, numbers, **more))
    assert "here" in str(refused.value)


def test_inputs_that_do_not_fit_are_refused_when_it_runs() -> None:
    weight = matrix("packed24", 40, 128, torch.float32)
    parts = parts_of(weight, "packed24")
    session = open_graph(graph_of("packed24", parts, sizes(weight), width=-1))
    with pytest.raises(Exception, match=r"Linear24 here: its input is no \[tokens, 128\]"):
        multiply(session, torch.randn(2, 127))
    for bias in (torch.randn(39), torch.randn(1, 40)):
        session = open_graph(graph_of("packed24", parts | {"bias": bias}, sizes(weight)))
        with pytest.raises(Exception, match=r"its bias is not \[40\]"):
            multiply(session, torch.randn(2, 128))


def test_an_instruction_set_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix("packed24", 40, 128, torch.float32)
    monkeypatch.setenv("SPARSIFY_CPU_ISA", "avx1024")
    with pytest.raises(Exception, match="SPARSIFY_CPU_ISA"):
        open_graph(graph_of("packed24", parts_of(weight, "packed24"), sizes(weight)))


def test_onnxruntime_infers_shapes_and_types() -> None:
    for given in (torch.float32, torch.float16):
        weight = matrix("packed24", 40, 128, given)
        model = graph_of("packed24", parts_of(weight, "packed24"), sizes(weight), given)
        (out,) = open_graph(model).get_outputs()
        assert (out.shape, out.type) == (["tokens", 40], "tensor(float)")


def test_it_needs_no_torch_no_python_and_no_openmp() -> None:
    content = Path(sparsify.onnx_library()).read_bytes()
    assert b"RegisterCustomOps" in content
    assert not [name for name in (b"libtorch", b"libpython", b"libgomp", b"libonnxruntime") if name in content]


def test_an_older_onnxruntime_is_told_which_it_needs() -> None:
    """A runtime whose table is too short gives none of version 17; it is asked for its first to say so."""
    library = ctypes.CDLL(sparsify.onnx_library())
    said: list[str] = []
    # Kept: C holds their addresses only.
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda code, text: said.append(text) or 1)
    table = (ctypes.c_void_p * 300)(ctypes.cast(create, ctypes.c_void_p))
    asked: list[int] = []

    def get(version: int) -> int:
        asked.append(version)
        return ctypes.addressof(table) if version == 1 else 0

    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(get)
    text = ctypes.create_string_buffer(b"1.16.3")
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(version, ctypes.c_void_p))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, ctypes.byref(base)) == 1
    assert asked == [17, 1] and said == [b"sparsify's operators need onnxruntime 1.17 or newer, and this is 1.16.3"]


HELD = """
#include "{header}"
#include "{ours}/onnx/interface.h"
#include <type_traits>

// Enumerations are numbers to us, and tables are our own types.
template <class T> struct plain {{ typedef typename std::conditional<std::is_enum<T>::value, int, T>::type type; }};
template <class T> struct plain<T*> {{ typedef typename plain<T>::type* type; }};
template <class T> struct plain<const T> {{ typedef const typename plain<T>::type type; }};
template <> struct plain<OrtApi> {{ typedef ort::Api type; }};
template <> struct plain<OrtCustomOp> {{ typedef ort::Operator type; }};
template <class R, class... A> struct plain<R (*)(A...)> {{
  typedef typename plain<R>::type (*type)(typename plain<A>::type...);
}};
template <class R, class... A> struct plain<R (*)(A...) noexcept> : plain<R (*)(A...)> {{}};
template <class T, class U> constexpr bool same() {{ return std::is_same<typename plain<T>::type, U>::value; }}

#define HOLD(name, place, arguments)                                                       \\
  static_assert(offsetof(OrtApi, name) == place * sizeof(void*), #name " lies elsewhere"); \\
  static_assert(same<decltype(OrtApi::name), ort::name##_type>(), #name " is another function");
SPARSIFY_ORT_FUNCTIONS(HOLD)
#define HOLD_TOO(name) HOLD(name, ort::name##_place, ())
HOLD_TOO(CreateStatus)
HOLD_TOO(ReleaseTensorTypeAndShapeInfo)
HOLD_TOO(ReleaseStatus)
#define FIELD(name)                                                                                             \\
  static_assert(offsetof(OrtCustomOp, name) == offsetof(ort::Operator, name), #name " lies elsewhere");         \\
  static_assert(same<decltype(OrtCustomOp::name), decltype(ort::Operator::name)>(), #name " is another function");
{fields}
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ort::ApiBase, GetApi), "");
static_assert(same<decltype(OrtApiBase::GetApi), decltype(ort::ApiBase::GetApi)>(), "");
static_assert(same<decltype(OrtApiBase::GetVersionString), decltype(ort::ApiBase::GetVersionString)>(), "");
static_assert(ORT_API_VERSION >= ort::VERSION && sizeof(OrtApi) >= sizeof(ort::Api), "");
static_assert(ort::FAIL == (int)ORT_FAIL && ort::INVALID_ARGUMENT == (int)ORT_INVALID_ARGUMENT, "");
static_assert(ort::NOT_IMPLEMENTED == (int)ORT_NOT_IMPLEMENTED && ort::INVALID_GRAPH == (int)ORT_INVALID_GRAPH, "");
static_assert(ort::FLOAT == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "");
static_assert(ort::UINT8 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "");
static_assert(ort::INT8 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, "");
static_assert(ort::INT64 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "");
static_assert(ort::FLOAT16 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "");
static_assert(ort::BFLOAT16 == (int)ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, "");
static_assert(ort::REQUIRED == (int)INPUT_OUTPUT_REQUIRED && ort::OPTIONAL == (int)INPUT_OUTPUT_OPTIONAL, "");
static_assert(ort::INT_ATTRIBUTE == (int)ORT_OP_ATTR_INT, "");
"""


def _header() -> Path | None:
    """onnxruntime's own header: where ``ONNXRUNTIME_INCLUDE`` says, in its wheel, or of the system."""
    own = os.environ.get("ONNXRUNTIME_INCLUDE")
    places = [Path(own)] if own else []
    places += [Path(onnxruntime.__file__).parent, Path("/usr/include"), Path("/usr/local/include")]
    found = (path for place in places for path in sorted(place.rglob("onnxruntime_c_api.h")))
    return next(found, None)


def test_the_declared_interface_is_that_of_onnxruntimes_header(tmp_path: Path) -> None:
    header, compiler = _header(), find_compiler()
    if header is None or compiler is None:
        pytest.skip("no header of onnxruntime here (libonnxruntime-dev, or ONNXRUNTIME_INCLUDE), or no compiler")
    ours = (SOURCES / "onnx" / "interface.h").read_text()
    body = ours[ours.index("struct Operator {") : ours.index("};", ours.index("struct Operator {"))]
    names = re.findall(r"\(\*(\w+)\)", body)
    assert len(names) == 21
    fields = "\n".join(f"FIELD({name})" for name in names)
    source = tmp_path / "held.cpp"
    source.write_text(HELD.format(header=header, ours=SOURCES, fields=fields))
    words = [*compiler, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", str(source)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_onnx_itself_knows_an_operator_by_its_function() -> None:
    """Checked and inferred by onnx, and computed by its reference: no library is asked."""
    from sparsify.backends.onnx.products.bodies import functions_of

    for layout in LAYOUTS:
        weight = matrix(layout, 40, 100, torch.float32)
        parts = parts_of(weight, layout) | {"bias": torch.randn(40)}
        model = graph_of(layout, parts, sizes(weight))
        model.functions.extend(functions_of(NAMES[layout], 23))
        onnx.checker.check_model(model, full_check=True)
        # It knows the rows; the columns are said by the files that we write.
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        assert inferred.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "tokens"
        x = torch.randn(3, 100)
        exact = x.double() @ weight.double().t() + parts["bias"].double()
        (reference,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()})
        for got in (torch.from_numpy(reference), multiply(open_graph(model, library=False), x)):
            assert error(got, exact) < 1e-5
        assert torch.equal(
            multiply(open_graph(model), x), multiply(open_graph(graph_of(layout, parts, sizes(weight))), x)
        )
