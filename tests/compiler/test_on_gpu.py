"""Whole compiles on a GPU that is not there: outputs are those of the CPU, and so is what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.fake_gpu import GPU, FakeGPU, Tagged, moved
from support.families import build, inputs
from torch import fx, nn

import sparsify
from sparsify.context import Context
from sparsify.evaluation.compare import compare
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.graph import runnable
from sparsify.method.pattern import NM
from sparsify.passes import Wanda
from sparsify.prune.fx_pass import GraphPrune
from sparsify.quality.perplexity import perplexity

Folder = Callable[[str], Path]


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("family", "specs"),
    [
        ("llama", ["wanda:2:4"]),
        ("llama", ["llm-pruner:25%", "sparsegpt:2:4"]),
        ("llama", ["permute:2:4", "wanda:2:4", "refine:epochs=1,rate=0.01"]),
        ("mixtral", ["wanda:2:4", "refine:epochs=1,rate=0.01"]),
        ("t5", ["wanda:2:4", "refine:epochs=1,rate=0.01"]),
        ("gpt2", ["llm-pruner:25%", "permute:2:4", "wanda:2:4"]),
        ("mixtral", ["llm-pruner:25%,importance=taylor-mix"]),
        ("mixtral", ["llm-pruner:50%,granularity=layer", "wanda:2:4"]),
        # Its graph looks positions up in constants.
        ("falcon", ["llm-pruner:25%"]),
    ],
)
def test_an_output_is_the_cpus(family: str, specs: list[str], folder: Folder, tmp_path: Path) -> None:
    # Refine holds some of them back.
    data = [inputs(family, rows=1, seed=seed) for seed in range(8 if "refine" in str(specs) else 2)]
    sparsify.compile(folder(family), specs, calibration=data, output=tmp_path / "cpu")
    with FakeGPU():
        sparsify.compile(folder(family), specs, calibration=data, output=tmp_path / "gpu", device="cuda")
    one, other = (open_source(tmp_path / name).weights for name in ("cpu", "gpu"))
    assert one.parameters() == other.parameters()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.parameters())


@pytest.mark.first(1)
@pytest.mark.parametrize("data", [[inputs("llama")], "self"])
def test_a_module_on_a_gpu_is_traced_sampled_from_and_pruned_there(data: Any) -> None:
    more: dict[str, Any] = {"calibration": data}
    if data == "self":
        more |= {"samples": 2, "sequence_length": 12}
    expected = sparsify.compile(build("llama"), ["wanda:2:4"], **more)
    with FakeGPU():
        found = sparsify.compile(moved(build("llama")), ["wanda:2:4"], device="cuda", **more)
        pairs = zip(found.model.parameters(), expected.model.parameters(), strict=True)
        assert all(one.device == GPU and torch.equal(one.cpu(), other) for one, other in pairs)


@pytest.mark.first(1)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_default_device_is_set_aside(family: str, folder: Folder, tmp_path: Path) -> None:
    """Here the meta device, in the place of a GPU: nothing that is made there holds numbers."""
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    text = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (500,))}, text)
    torch.set_default_device("meta")
    try:
        more: dict[str, Any] = {"calibration": str(text), "samples": 2, "sequence_length": 32}
        found = sparsify.compile(folder(family), ["llm-pruner:25%", "wanda:2:4"], output=tmp_path / "out", **more)
        compare(folder(family), ["sparsegpt:2:4"], data=str(text), windows=2, **more)
        pruned = GraphPrune(Wanda(NM(2, 4)), [x])(fx.symbolic_trace(net))
        assert torch.empty(1).is_meta
    finally:
        torch.set_default_device(None)
    assert pruned is not None and next(pruned.graph_module.parameters()).count_nonzero() == 32
    again = sparsify.compile(folder(family), ["llm-pruner:25%", "wanda:2:4"], **more)
    for target in again.runs[0].targets:
        assert torch.equal(again.weight(target.parameter), found.weight(target.parameter))


def test_another_backend_writes_what_was_pruned_there(folder: Folder, tmp_path: Path) -> None:
    more: dict[str, Any] = {"calibration": [inputs("llama")], "to": "packed:choice=smallest", "device": "cuda"}
    with FakeGPU():
        done = sparsify.compile(folder("llama"), ["wanda:2:4"], output=tmp_path / "out", **more)
    assert done.output is not None and (done.output / "sparsify.json").exists()


def test_perplexity_is_the_cpus_and_waits_for_no_batch(folder: Folder) -> None:
    source = open_source(folder("llama"))
    counts = []
    for windows in (6, 12):
        ids = torch.randint(3, 60, (windows, 300), generator=torch.Generator().manual_seed(0))
        expected = perplexity(source, ids)
        with FakeGPU() as gpu:
            assert perplexity(source, ids, Context(GPU)) == expected
        counts.append(sum(gpu.waited.values()))
    assert counts[0] == counts[1]


def test_compare_is_the_cpus(folder: Folder, tmp_path: Path) -> None:
    text = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (500,), generator=torch.Generator().manual_seed(0))}, text)
    more: dict[str, Any] = {"data": str(text), "calibration": str(text), "samples": 2, "sequence_length": 32}
    expected = compare(folder("llama"), ["wanda:2:4"], **more)
    with FakeGPU(free=1 << 30):
        found = compare(folder("llama"), ["wanda:2:4"], device="cuda", **more)
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert (one.perplexity, one.errors, one.kept) == (other.perplexity, other.errors, other.kept)
    assert found.rows[1].memory == 1 << 29


def test_a_graph_that_runs_by_itself_lies_on_one_device(folder: Folder) -> None:
    with FakeGPU():
        module = runnable(capture(open_source(folder("llama")), inputs("llama")), GPU)
        assert isinstance(module(inputs("llama")["input_ids"].to("cuda")), Tagged)
