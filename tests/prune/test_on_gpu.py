"""The engine on a GPU, as far as a CPU can tell: nothing mixes two devices, masks are the CPU's, no batch waits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_gpu import GPU, FakeGPU, Tagged, moved
from support.families import FAMILIES, build, inputs
from support.pruning import prune_captured
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsify.context import SiteResult
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program
from sparsify.ir.store import MemoryStore
from sparsify.method.pattern import NM
from sparsify.passes import Wanda
from sparsify.prune.fx_pass import GraphPrune

METHODS = [
    "wanda:2:4", "wanda:50%,norm=max,variant=true", "wanda:60%,allocation=owl", "wanda:60%,allocation=error",
    "wanda:50%,update=iterative", "magnitude:2:4,update=block", "sparsegpt:2:4", "sparsegpt:50%,compensation=exact",
    "apt:2:4", "apt:50%,solver=cg", "alps:2:4", "twin:2:4", "gblm:2:4", "gblm:50%,norm=l1",
    "gradient:50%,metric=platon", "activation:25%,metric=correlation",
]  # fmt: skip
EXPERTS = ["wanda:2:4", "sparsegpt:50%", "apt:2:4", "twin:2:4,mask=wanda", "gblm:2:4", "activation:25%"]
SCHEDULED = [(spec, schedule) for spec in ("wanda:2:4", "sparsegpt:2:4", "gblm:2:4") for schedule in ("block", "dense")]
CASES = [
    *[("llama", spec, "layer") for spec in METHODS],
    *[("mixtral", spec, "layer") for spec in EXPERTS],
    *[(family, *case) for family in ("llama", "mixtral") for case in SCHEDULED],
]


@cache
def traced(family: str, masked: bool) -> Program:
    return capture(open_source(build(family)), batches(family, 1, masked)[0])


def pruned_on_gpu(
    program: Program,
    spec: str,
    data: list[dict[str, Tensor]],
    schedule: str = "layer",
    free: int = 1 << 34,
    **more: Any,
) -> tuple[dict[str, Tensor], list[SiteResult], FakeGPU]:
    """What a GPU of ``free`` bytes makes of a program; and that GPU."""
    with FakeGPU(free) as gpu:
        return *prune_captured(program, spec, data, schedule, device=GPU, **more), gpu


def batches(family: str, count: int = 3, masked: bool = False) -> list[dict[str, Tensor]]:
    """Sequences one by one, the last four tokens of each padding where they are masked."""
    mask = {"attention_mask": (torch.arange(16) < 12).long()[None]} if masked else {}
    return [inputs(family, rows=1, seed=seed, **mask) for seed in range(count)]


def check(program: Program, spec: str, data: list[dict[str, Tensor]], schedule: str = "layer", **limits: Any) -> None:
    """Prune on the CPU and on the GPU: the same weights, and the same said of them."""
    # Derivatives of attention are taken by plain products on a GPU.
    with sdpa_kernel(SDPBackend.MATH) if spec.startswith(("gblm", "gradient")) else nullcontext():
        expected, said = prune_captured(program, spec, data, schedule)
        found, told, _ = pruned_on_gpu(program, spec, data, schedule, **limits)
    assert found.keys() == expected.keys() and not any(isinstance(value, Tagged) for value in found.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [(site.name, site.kept, site.error) for site in told] == [(s.name, s.kept, s.error) for s in said]


@pytest.mark.first(12)
@pytest.mark.parametrize(("family", "spec", "schedule"), CASES)
def test_masks_are_the_cpus(family: str, spec: str, schedule: str) -> None:
    check(traced(family, False), spec, batches(family), schedule)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, captured: Callable[[str], Program]) -> None:
    check(captured(family), "wanda:2:4", [inputs(family, seed=seed) for seed in (1, 2)])


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec"), list(zip(FAMILIES, cycle(["sparsegpt:4:8", "twin:2:4"]))))
def test_every_family_by_products(family: str, spec: str, captured: Callable[[str], Program]) -> None:
    check(captured(family), spec, [inputs(family, seed=seed) for seed in (1, 2)])


@pytest.mark.first(4)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("limits", [{}, {"free": 0}, {"free": 30_000}, {"memory": 0}, {"memory": 3000}])
def test_padding_and_whatever_the_memory(family: str, limits: dict[str, int]) -> None:
    """All on the GPU, nothing there, a part; in files."""
    for spec, schedule in (("wanda:2:4", "block"), ("twin:2:4,mask=wanda", "layer"), ("gblm:2:4", "layer")):
        check(traced(family, True), spec, batches(family, masked=True), schedule, **limits)


@pytest.mark.first(3)
@pytest.mark.parametrize("spec", ["wanda:2:4", "twin:2:4,mask=wanda", "gblm:2:4"])
@pytest.mark.parametrize("masked", [False, True])
def test_no_batch_waits_for_the_gpu(spec: str, masked: bool) -> None:
    """But of experts: where their rows end has to be known in Python, and with padding which tokens they are."""
    for family, allowed in (("llama", 0), ("mixtral", 2 if masked else 1)):
        waited = []
        for count in (2, 5):
            *_, gpu = pruned_on_gpu(traced(family, masked), spec, batches(family, count, masked))
            waited.append(gpu.waited)
        more = {place for place in waited[1] if waited[1][place] != waited[0][place]}
        assert {Path(file).name for file, *_ in more} <= {"rows.py"} and len(more) == allowed, more


def test_a_graph_of_a_gpu_gets_its_weights_there() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    graph, x = fx.symbolic_trace(net), torch.randn(16, 8)
    expected = GraphPrune(Wanda(NM(2, 4)), [x])(graph)
    with FakeGPU():
        there = moved(fx.symbolic_trace(copy.deepcopy(net)))
        found = GraphPrune(Wanda(NM(2, 4)), [x], device=GPU)(there)
        assert expected is not None and found is not None
        pairs = zip(found.graph_module.parameters(), expected.graph_module.parameters(), strict=True)
        assert all(new.device == GPU and torch.equal(new.cpu(), old) for new, old in pairs)


def test_what_a_module_on_a_gpu_holds_is_read_like_a_file() -> None:
    with FakeGPU():
        store = MemoryStore(None, {"weight": torch.ones(2).to("cuda")})
        assert store.read("weight").device.type == "cpu"
        store.write("weight", torch.zeros(2))
        assert not store.read("weight").any()


def test_the_fake_gpu_finds_what_cuda_would() -> None:
    with FakeGPU() as gpu:
        here, there = torch.arange(4), torch.arange(4).to("cuda")
        for mix in (
            lambda: here + there,
            lambda: there[here],
            lambda: torch.equal(here, there),
            lambda: there.scatter(0, here, 1),
            lambda: torch.searchsorted(there, torch.arange(2)),
            lambda: torch.cat([here, there]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
        assert (there + torch.tensor(1)).device == torch.zeros_like(there).device == GPU == there[1:].device
        assert torch.ones(2, device="cuda").is_cuda and there.sort().values.is_cuda and not there.cpu().is_cuda
        before = sum(gpu.waited.values())
        _ = (int(there.sum()), there[there > 1], there.nonzero(), bool(there.any()))
        there[there > 1] = 0
        assert sum(gpu.waited.values()) - before == 4
