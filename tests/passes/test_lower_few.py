"""LowerSparse where weights lie on a grid of few bits: integers in the graphs of other compilers, and their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpus import H200
from support.lowering import GRAPHS, ops_of, times
from support.matrices import TOLERANCE, error, pruned, pruned_24
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from sparsify.errors import SpecError
from sparsify.method.spec import parse_pass
from sparsify.method.statistics import InputStatistics
from sparsify.passes import LowerSparse
from sparsify.prune.fx_pass import GraphPrune
from sparsify.runtime.cpu.stopwatch import Stopwatch, Timing
from sparsify.runtime.packed_weight import PackedWeight

SMALLEST = LowerSparse(choice="smallest")


def rounded(weight: Tensor, spec: str) -> Tensor:
    """``weight`` as the pass ``round`` leaves it, without data."""
    own: Any = parse_pass(f"round:{spec},compensation=none")
    result: Tensor = own.prune(weight, InputStatistics({}, 0, 0)).weight
    return result


FORMS = {
    "linear_24_few": (pruned_24(128, 256), "int8", ("packed24", 8, None)),
    "linear_24_few of 4 bits": (pruned_24(128, 256), "int4,group=32", ("packed24", 4, 32)),
    "linear_bitmask_few": (pruned(128, 256, 0.6), "int8,group=64", ("bitmask", 8, 64)),
    "linear_bitmask_few of 4 bits": (pruned(128, 256, 0.6), "int4,group=128", ("bitmask", 4, 128)),
    "linear_dense_few": (pruned(128, 256, 0.0), "int8", ("dense", 8, None)),
    "linear_dense_few of 3 bits": (pruned(128, 256, 0.0), "int3,group=64", ("dense", 4, 64)),
}


class Net(nn.Module):
    """A layer with a bias before one without, whose weight lies the other way round."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 128), nn.Parameter(weight[:, :128].t().contiguous())
        with torch.no_grad():
            self.up.weight.copy_(weight)
        self.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) @ self.down


@pytest.mark.first(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_found_packed_and_right(form: str, dtype: torch.dtype) -> None:
    weight, spec, (layout, bits, group) = FORMS[form]
    net, x = Net(rounded(weight.to(dtype), spec)).eval(), torch.randn(5, 256).to(dtype)
    dense = sum(p.nbytes for p in net.parameters())
    for kind, trace in GRAPHS.items():
        with torch.no_grad():
            result = SMALLEST(trace(net, x))
            lowered = result.graph_module
            # ``down`` reads the transpose of a rounded matrix: its rows are on no grid, unless pruned none has it.
            assert ops_of(lowered)[form.split(" ")[0]] >= 1, kind
            exact = torch.relu(functional(net.up, x)).double() @ net.down.double()
            for rows in (5,) if kind in ("module", "decomposed") else (1, 5, 40):
                some = x[:1].repeat(rows, 1) if rows != 5 else x
                want = exact if rows == 5 else exact[:1].repeat(rows, 1)
                assert error(lowered(some), want) < 4 * TOLERANCE[dtype], (kind, rows)
    record = next(r for r in lowered.meta["sparsify"] if tuple(r.shape) == (128, 256))
    assert (record.layout, record.bits, record.group) == (layout, bits, group) and record.kernel.endswith(
        "_few.default"
    )
    assert sum(t.nbytes for t in lowered.state_dict().values()) < dense


def functional(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's product as the next layer is given it."""
    out: Tensor = layer(x)
    return out


def two(spec: str = "int4,group=64") -> nn.Sequential:
    """Two layers with a zero in every other place, on a grid along their inputs."""
    net = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 256)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(rounded(pruned_24(*layer.weight.shape), spec))
    return net


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_of_a_lowered_graph(backend: str, tmp_path: Path) -> None:
    """Fake tensors in, whatever the number of rows; and out of an export that was saved."""
    net, x = two(), torch.randn(5, 256)
    with torch.no_grad():
        lowered = SMALLEST(GRAPHS["export"](net, x)).graph_module
        assert ops_of(lowered)["linear_24_few"] == 2
        compiled = torch.compile(lowered, backend=backend, fullgraph=True, dynamic=True)
        again = torch.export.export(lowered, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        torch.export.save(again, tmp_path / "net.pt2")
        loaded = torch.export.load(tmp_path / "net.pt2").module()
        for rows in (2, 9, 70):
            batch = torch.randn(rows, 256)
            want = net.double()(batch.double())
            net.float()
            assert error(compiled(batch), want) < 1e-5 and error(loaded(batch), want) < 1e-5
    torch._dynamo.reset()


def test_rounded_and_lowered_in_one_pass_manager() -> None:
    net, x = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).eval(), torch.randn(256, 128)
    specs = ["magnitude:2:4", "round:int8"]
    passes = [*(GraphPrune(parse_pass(spec), [x]) for spec in specs), SMALLEST]  # type: ignore[arg-type]
    with torch.no_grad():
        lowered = PassManager(passes, run_checks_after_each_pass=True)(fx.symbolic_trace(net)).graph_module
        plain = PassManager(passes[:2])(fx.symbolic_trace(net)).graph_module
        assert error(lowered(x), plain.double()(x.double())) < 1e-5
    assert ops_of(lowered)["linear_24_few"] == 2


def test_the_backend_of_torch_compile_and_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch)
    net, x = two("int8"), torch.randn(3, 256)
    seen: list[fx.GraphModule] = []
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="sparsify")(x), net(x), rtol=1e-4, atol=1e-4)

        def backend(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
            seen.append(LowerSparse(activations="int8")(graph, example_inputs).graph_module)
            return seen[0].forward

        torch._dynamo.reset()
        got = torch.compile(net, backend=backend, fullgraph=True)(x)
        assert 1e-5 < error(got, net(x).double()) < 0.02, "inputs rounded to 8 bits"
    assert ops_of(seen[0])["linear_24_few"] == 2
    torch._dynamo.reset()


def test_the_faster_form_is_taken_where_times_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers that take longer than the same values at full width cost nobody the packed product."""
    for few, full, operator in ((0.5, 0.8, "linear_24_few"), (0.9, 0.6, "linear_24"), (9.0, 0.6, "linear_24")):

        def packed(self: Stopwatch, weight: Tensor, own: PackedWeight, few: float = few, full: float = full) -> Timing:
            return Timing(1.0, 1.0, full if own.packed.bits is None else few, 1)

        monkeypatch.setattr(Stopwatch, "packed", packed)
        result = LowerSparse(merge=False)(fx.symbolic_trace(two()))
        assert ops_of(result.graph_module)[operator] == 2
        assert all(r.timing.packed == min(few, full) for r in result.graph_module.meta["sparsify"])
    monkeypatch.setattr(Stopwatch, "packed", lambda *_: Timing(1.0, 1.0, 3.0, 1))
    slow = LowerSparse(dense=False)(fx.symbolic_trace(two()))
    assert not slow.modified
    assert all("takes 3.00× its time" in str(r.reason) for r in slow.graph_module.meta["sparsify"])


class Siblings(nn.Module):
    """Two on one grid, and one on another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(128, n, bias=n == 64) for n in (64, 32, 32))
        with torch.no_grad():
            for layer, spec in ((self.q, "int8"), (self.k, "int8"), (self.v, "int4,group=32")):
                layer.weight.copy_(rounded(pruned_24(*layer.weight.shape), spec))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x) * self.v(x)], dim=-1)


def test_siblings_of_one_grid_become_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Siblings().eval(), torch.randn(5, 128)
    times(monkeypatch, merged=0.5)
    with torch.no_grad():
        lowered = LowerSparse()(fx.symbolic_trace(net)).graph_module
        assert error(lowered(x), net(x).double()) < 1e-5
    assert ops_of(lowered)["linear_24_few"] == 2 and ops_of(lowered)["split_with_sizes_copy"] == 1
    found = {r.name: r for r in lowered.meta["sparsify"]}
    assert found["q.weight"].merged == ("k.weight",) and found["v.weight"].merged == ()
    assert (found["v.weight"].bits, found["v.weight"].group) == (4, 32) and found["q.weight"].bits == 8


def test_stacks_of_experts() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stack = [rounded(pruned_24(64, 128, seed=e), "int8").t() for e in range(3)]
            self.weight = nn.Parameter(torch.stack(stack), requires_grad=False)

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.weight, offs=ends)

    net, x = Stack().bfloat16().eval(), torch.randn(9, 128).bfloat16()
    with torch.no_grad():
        for expert in net.weight:
            expert.copy_(rounded(expert.t().contiguous(), "int8").t())
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    lowered = SMALLEST(fx.symbolic_trace(net)).graph_module
    assert ops_of(lowered)["experts_24_few"] == 1
    want = torch.cat([x[:2].double() @ net.weight[0].double(), x[2:].double() @ net.weight[2].double()])
    assert error(lowered(x, ends), want) < TOLERANCE[torch.bfloat16]


def test_full_width_on_request_and_on_a_gpu() -> None:
    """A GPU has no kernel for integers: the values of the grid lie there at the width of their dtype."""
    net, x = two("int8"), torch.randn(5, 256)
    full = LowerSparse(choice="smallest", values="full")(fx.symbolic_trace(net)).graph_module
    assert ops_of(full)["linear_24"] == 2 and {r.bits for r in full.meta["sparsify"]} == {None}
    half = two("int8").bfloat16()
    there = LowerSparse(target=H200)(fx.symbolic_trace(half)).graph_module
    assert ops_of(there)["linear_24_prepared"] == 2
    with torch.no_grad():
        assert error(full(x), net(x).double()) < 1e-5
        assert error(there(x.bfloat16()), half(x.bfloat16()).double()) < 1e-2
    dense = LowerSparse(target=H200, layout="dense")(fx.symbolic_trace(half))
    assert not dense.modified and all("2:4" in str(r.reason) for r in dense.graph_module.meta["sparsify"])


@pytest.mark.parametrize("options", [{"layout": "dense"}, {"activations": "int8"}])
def test_options_of_integers_where_there_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="weights held as integers"):
        LowerSparse(values="full", **options)


def test_a_dense_layout_without_a_grid_is_refused_by_name() -> None:
    net = nn.Linear(128, 128).eval()
    result = LowerSparse(choice="smallest", layout="dense")(fx.symbolic_trace(nn.Sequential(net)))
    assert not result.modified and "no grid" in str(result.graph_module.meta["sparsify"][0].reason)
