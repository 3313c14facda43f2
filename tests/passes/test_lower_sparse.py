"""LowerSparse: graphs of other compilers before and after, their numbers, and why a weight stays dense."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.families import build
from support.gpus import A100, H200
from support.lowering import GRAPHS, ops_of, times
from support.matrices import error, pruned, pruned_24
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional

import sparsify
from sparsify.errors import SpecError, TraceError
from sparsify.method.pattern import NM
from sparsify.passes import LowerSparse, Wanda
from sparsify.prune.fx_pass import GraphPrune
from sparsify.runtime.cpu.stopwatch import Stopwatch
from sparsify.runtime.cuda.gpu import GPU

SMALLEST = LowerSparse(choice="smallest")


def records(graph: fx.GraphModule) -> dict[str, str]:
    return {r.name: r.layout for r in graph.meta["sparsify"]}


class Every(nn.Module):
    """Each way in which a graph contracts an activation with a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.bare = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.conv1d_weight, self.conv1d_bias = nn.Parameter(torch.empty(64, 128)), nn.Parameter(torch.randn(128))
        self.turned = nn.Parameter(torch.empty(96, 128))
        self.stack = nn.Parameter(torch.empty(3, 96, 64))
        with torch.no_grad():
            self.lin.weight.copy_(pruned_24(64, 64))
            self.bare.weight.copy_(pruned(64, 64, 0.6))
            self.conv1d_weight.copy_(pruned_24(128, 64).t())
            self.turned.copy_(pruned_24(96, 128))
            self.stack.copy_(torch.stack([pruned_24(64, 96, seed=i).t() for i in range(3)]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x) + self.bare(x)
        x = torch.addmm(self.conv1d_bias, x, self.conv1d_weight)
        x = x @ self.turned.t()
        return x @ self.stack[1]


@pytest.mark.parametrize("kind", GRAPHS)
def test_every_layout_is_found_packed_and_right(kind: str) -> None:
    net, x = Every().eval(), torch.randn(5, 64)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        graph, want = GRAPHS[kind](net, x), net(x)
        result = SMALLEST(graph)
        got = result.graph_module(x)
    assert result.modified
    assert error(got, want.double()) < 1e-5
    found = Counter(records(result.graph_module).values())
    assert found == {"packed24": 4, "bitmask": 1}, result.graph_module.meta["sparsify"]
    ops = ops_of(result.graph_module)
    assert ops["linear_24"] == 4 and ops["linear_bitmask"] == 1
    assert not ops.keys() & {"linear", "addmm", "mm", "matmul", "lin", "bare"}
    held = result.graph_module.state_dict()
    assert {k for k in held if not k.startswith("sparsify_packed")} <= {"lin.bias", "conv1d_bias"}, "dense gone"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the module given is not changed"


def test_a_lowered_export_is_exported_again_with_a_dynamic_dimension(tmp_path: Any) -> None:
    net, x = Every().eval(), torch.randn(5, 64)
    with torch.no_grad():
        lowered = SMALLEST(GRAPHS["export"](net, x)).graph_module
        again = torch.export.export(lowered, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        torch.export.save(again, tmp_path / "net.pt2")
        loaded = torch.export.load(tmp_path / "net.pt2").module()
        for rows in (2, 9, 70):
            batch = torch.randn(rows, 64)
            assert error(loaded(batch), net(batch).double()) < 1e-5
    compiled = torch.compile(lowered, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert error(compiled(x), net(x).double()) < 1e-5


def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name:
                p.copy_(torch.stack([pruned(*m.shape, 0.6) for m in p]))
    ids = torch.randint(3, 60, (2, 16))
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        result = SMALLEST(exported)
        got = result.graph_module(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    layouts = records(result.graph_module)
    assert ops_of(result.graph_module)["experts_bitmask"] == 4
    assert all(layout == ("bitmask" if "experts" in name else "dense") for name, layout in layouts.items())


class Siblings(nn.Module):
    def __init__(self, bias: tuple[bool, bool, bool] = (True, False, True)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, n, bias=b) for n, b in zip((64, 32, 32), bias, strict=True))
        with torch.no_grad():
            for layer in (self.q, self.k, self.v):
                layer.weight.copy_(pruned_24(*layer.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x) * self.v(x)], dim=-1)


@pytest.mark.first(3)
@pytest.mark.parametrize("bias", [(True, False, True), (False, False, False)])
@pytest.mark.parametrize("kind", GRAPHS)
def test_siblings_are_joined_where_that_pays(
    kind: str, bias: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = Siblings(bias).eval(), torch.randn(5, 64)
    times(monkeypatch, merged=0.5)
    with torch.no_grad():
        lowered = LowerSparse()(GRAPHS[kind](net, x)).graph_module
        torch.testing.assert_close(lowered(x), net(x), rtol=1e-4, atol=1e-4)
    ops = ops_of(lowered)
    assert ops["linear_24"] == 1 and ops["split_with_sizes_copy"] == 1
    assert sorted(len(r.merged) for r in lowered.meta["sparsify"]) == [2, 2, 2]
    times(monkeypatch, merged=1.0)
    with torch.no_grad():
        apart = LowerSparse()(GRAPHS[kind](net, x)).graph_module
        torch.testing.assert_close(apart(x), net(x), rtol=1e-4, atol=1e-4)
    assert ops_of(apart)["linear_24"] == 3 and not any(r.merged for r in apart.meta["sparsify"])
    times(monkeypatch, merged=0.1)
    never = LowerSparse(merge=False)(GRAPHS[kind](net, x)).graph_module
    assert ops_of(never)["linear_24"] == 3


def test_many_groups_of_siblings_each_keep_their_own_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A joined matrix that is done with must not be taken for the next one."""
    times(monkeypatch, merged=0.1)
    layers: list[nn.Module] = []
    for number in range(6):
        layer = Siblings()
        with torch.no_grad():
            for at, part in enumerate((layer.q, layer.k, layer.v)):
                part.weight.copy_(pruned_24(*part.weight.shape, seed=3 * number + at) / 8)
        layers += [layer, nn.Linear(96, 64)]
    net, x = nn.Sequential(*layers).eval(), torch.randn(3, 64)
    with torch.no_grad():
        lowered = LowerSparse()(fx.symbolic_trace(net)).graph_module
        torch.testing.assert_close(lowered(x), net(x), rtol=1e-4, atol=1e-4)
    assert ops_of(lowered)["linear_24"] == 6


@pytest.mark.parametrize(
    ("target", "arguments", "writes"),
    [
        ("mul_", (2,), True),
        (operator.imul, (2,), True),
        (operator.setitem, (0, 5.0), True),
        (operator.mul, (2,), False),
        (torch.relu, (), False),
        ("relu", (), False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_input_written_in_place_keeps_its_siblings_apart(
    target: Any, arguments: tuple[Any, ...], writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is only read does not."""

    class InPlace(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            first = self.q(x)
            x.mul_(2)
            return torch.cat([first, self.k(x)], dim=-1)

    times(monkeypatch, merged=0.1)
    traced = fx.symbolic_trace(InPlace().eval())
    (between,) = (node for node in traced.graph.nodes if node.target == "mul_")
    between.op = "call_method" if isinstance(target, str) else "call_function"
    between.target, between.args = target, (between.args[0], *arguments)
    traced.recompile()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = traced(x.clone())
        lowered = LowerSparse()(traced).graph_module
        torch.testing.assert_close(lowered(x.clone()), expected, rtol=1e-4, atol=1e-4)
    assert ops_of(lowered)["linear_24"] == (2 if writes else 1)


def test_dense_where_dense_is_faster_with_the_times_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Siblings().eval(), torch.randn(1, 64)
    times(monkeypatch, torch_=1.0, dense=1.0, packed=1.3)
    result = LowerSparse()(GRAPHS["export"](net, torch.randn(5, 64)))
    assert not result.modified and ops_of(result.graph_module)["linear"] == 3
    for record in result.graph_module.meta["sparsify"]:
        assert record.layout == "dense" and "1.30× its time" in record.reason
        assert record.timing is not None and record.timing.packed == 1.3
    # 0.8 of the dense speed is what a smaller file may cost.
    times(monkeypatch, torch_=1.0, dense=1.0, packed=1.2)
    assert LowerSparse()(GRAPHS["export"](net, torch.randn(5, 64))).modified
    # Our dense kernel where it is faster than torch's.
    times(monkeypatch, torch_=2.0, dense=1.0, packed=3.0)
    fast = LowerSparse()(GRAPHS["export"](net, torch.randn(5, 64)))
    assert fast.modified and ops_of(fast.graph_module)["linear_dense"] == 3
    with torch.no_grad():
        torch.testing.assert_close(fast.graph_module(x.repeat(2, 1)), net(x.repeat(2, 1)))
    assert not LowerSparse(dense=False)(GRAPHS["export"](net, torch.randn(5, 64))).modified


def test_each_shape_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def race(self: Stopwatch, calls: list[Any]) -> list[float]:
        seen.append(len(calls))
        return [3.0, 3.0, 1.0][: len(calls)]

    monkeypatch.setattr(Stopwatch, "race", race)
    layers = [nn.Linear(64, 64) for _ in range(6)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(pruned_24(64, 64))
    net = nn.Sequential(*layers).eval()
    LowerSparse()(fx.symbolic_trace(net))
    assert seen == [3, 3, 3], "for one token, for 8 and for 32"


class Odd(nn.Module):
    """Contractions that have no packed form."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.conv = nn.Parameter(pruned_24(64, 64)), nn.Conv1d(64, 64, 1)
        self.lin, self.wide = nn.Linear(64, 64), nn.Linear(64, 64).double()
        with torch.no_grad():
            self.wide.weight.copy_(pruned_24(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.left @ x.t()
        y = self.conv(y.unsqueeze(0)).squeeze(0)
        z = torch.addmm(y.t(), x, self.left, alpha=2)
        return self.wide(self.lin(z).double())


def test_what_is_not_packed_is_named_with_its_reason() -> None:
    net, x = Odd().eval(), torch.randn(64, 64)
    result = SMALLEST(GRAPHS["module"](net, x))
    assert not result.modified
    reasons = {r.name: r.reason for r in result.graph_module.meta["sparsify"]}
    assert set(reasons) == {"left", "conv.weight", "lin.weight", "wide.weight"}
    said = " ".join(str(r.reason) for r in result.graph_module.meta["sparsify"])
    for text in ("left of the activation", "conv1d has no packed form", "addmm with factors", "no zeros", "float64"):
        assert text in said, said


def test_after_wanda_in_one_pass_manager() -> None:
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(8, 64)
    manager = PassManager([GraphPrune(Wanda(NM(2, 4)), [x]), SMALLEST], run_checks_after_each_pass=True)
    with torch.no_grad():
        lowered = manager(fx.symbolic_trace(net)).graph_module
        pruned_net = sparsify.compile(net, ["wanda:2:4"], calibration=[x]).model
        torch.testing.assert_close(lowered(x), pruned_net(x), rtol=1e-4, atol=1e-4)
    assert ops_of(lowered)["linear_24"] == 2
    with pytest.raises(TraceError, match=r"torch\.compile"):
        SMALLEST(net)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="placeholders"):
        SMALLEST(fx.symbolic_trace(net), [x, x])


def test_as_the_last_pass_of_a_compile(tmp_path: Any) -> None:
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), torch.randn(8, 64)
    passes = ["wanda:2:4", "lower-sparse:choice=smallest"]
    result = sparsify.compile(net, passes, calibration=[x])
    plain = sparsify.compile(net, passes[:1], calibration=[x]).model
    lowered: Any = result.model
    assert ops_of(lowered)["linear_24"] == 2 and not result.runs[1].written and result.runs[0].kept == 0.5
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), plain(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecError, match="writes the parameters of a model, and lower-sparse changes its graph"):
        sparsify.compile(net, passes, calibration=[x], output=tmp_path / "out")
    with pytest.raises(SpecError, match="wanda after lower-sparse"):
        sparsify.compile(net, passes[::-1], calibration=[x])


@pytest.mark.slow
def test_a_language_model_lifted_by_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify.compile(build("llama"), ["magnitude:2:4"], calibration=[torch.ones(1, 4, dtype=torch.long)]).model
    ids = torch.randint(3, 60, (2, 16))
    seen = []

    def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        lowered = SMALLEST(graph, example_inputs).graph_module
        seen.append(lowered)
        return lowered.forward

    with torch.no_grad():
        got = torch.compile(model, backend=backend, fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    counts = Counter(records(seen[0]).values())
    assert counts["packed24"] + counts["bitmask"] == 14 and counts["dense"] == 1


def test_for_a_gpu_that_is_not_here() -> None:
    """Siblings are one matrix, plans are built-in defaults, and a plain reference runs them."""
    net, x = Siblings().eval().to(torch.bfloat16), torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        lowered = LowerSparse(target=H200)(fx.symbolic_trace(net)).graph_module
        assert error(lowered(x), net(x).double()) < 1e-2
        apart = LowerSparse(target=A100, policy="both", merge=False)(fx.symbolic_trace(net)).graph_module
        assert error(apart(x), net(x).double()) < 1e-2
    assert ops_of(lowered)["linear_24_prepared"] == 1 and ops_of(lowered)["split_with_sizes_copy"] == 1
    found = {r.name: r for r in lowered.meta["sparsify"]}
    assert found["q.weight"].merged == ("k.weight", "v.weight") and found["q.weight"].layout == "packed24"
    assert str(found["q.weight"].plan).startswith("8:decode_w8_r1_m1") and not found["q.weight"].gains
    assert ops_of(apart)["linear_24_prepared"] == 3 and not any(r.merged for r in apart.meta["sparsify"])


def test_what_a_gpu_does_not_take_stays_dense_and_is_named() -> None:
    old = GPU("V100", (7, 0), 80, True, None)
    for net, options, why in (
        (Siblings(), LowerSparse(target=H200), "float32"),
        (Siblings().bfloat16(), LowerSparse(target=H200, layout="bitmask"), "not 2:4, the only sparsity"),
        (Siblings().bfloat16(), LowerSparse(target=old), "no sparse tensor cores"),
        (Siblings().bfloat16(), LowerSparse(target=replace(H200, compiler=False)), "no NVRTC"),
    ):
        result = options(fx.symbolic_trace(net.eval()))
        assert not result.modified
        assert all(why in str(r.reason) for r in result.graph_module.meta["sparsify"])


@pytest.mark.slow
def test_the_backend_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch)
    net = Siblings().eval()
    x = torch.randn(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="sparsify")(x), net(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"gradients are on.*torch\.no_grad"):
        torch.compile(net, backend="sparsify")(x)
    torch._dynamo.reset()
    plain = functional_net()
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"none of 1 weights was packed \(no zeros\)"):
        torch.testing.assert_close(torch.compile(plain, backend="sparsify")(x), plain(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def functional_net() -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 64))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.w)

    return Plain().eval()
