"""What is refused because of how it was made: plug-ins that are none, graphs and configs of unknown kinds."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build, save
from torch import fx, nn

import sparsify
from sparsify.compiler.backend import as_backend
from sparsify.errors import BackendError, CheckpointError, SpecError, TraceError
from sparsify.evaluation.compare import compare
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source
from sparsify.ir.graph import inline
from sparsify.method import registry
from sparsify.structure import layers


def plugged(monkeypatch: pytest.MonkeyPatch, **entries: str) -> None:
    """As if a package of somebody's registered these."""

    def found(group: str) -> list[EntryPoint]:
        return [EntryPoint(name, value, group) for name, value in entries.items()]

    monkeypatch.setattr(registry, "entry_points", found)


def test_plug_ins_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plugged(monkeypatch, odd="json:dumps", gone="no_such_package:X", without="json:nothing")
    with pytest.raises(SpecError, match=r"pass 'odd': <function dumps.*which is no Pass"):
        sparsify.parse_pass("odd:2:4")
    with pytest.raises(SpecError, match=r"entry point no_such_package:X does not load \(ModuleNotFoundError"):
        sparsify.parse_pass("gone:2:4")
    with pytest.raises(SpecError, match=r"does not load \(AttributeError"):
        sparsify.parse_pass("without:2:4")
    with pytest.raises(SpecError, match="which is none"):
        as_backend("odd")
    with pytest.raises(SpecError, match="which is none"):
        as_backend(object())  # type: ignore[arg-type]


def test_comparing_what_does_not_prune_weight_by_weight(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="neither prunes nor trains weight by weight"):
        compare(tmp_path, ["wanda:2:4", "llm-pruner:25%"])
    with pytest.raises(SpecError, match="nothing to do"):
        compare(tmp_path, [])


def test_a_config_that_builds_no_model(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"], "hidden_act": "no"})
    )
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(folder)


class Branches(nn.Module):
    """Control flow that stays in the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x)


def test_graphs_with_graphs_inside() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(TraceError, match="the operator cond"):
        capture(open_source(Branches()), {"0": x})
    with pytest.raises(TraceError, match="with autocast on"):
        capture(open_source(Autocast()), {"0": x})
    owner, graph = nn.Module(), fx.Graph()
    owner.register_buffer("held", torch.ones(2))
    graph.output(graph.get_attr("held"))
    with pytest.raises(TraceError, match="a constant held inside a nested graph"):
        inline(graph, owner, fx.Graph(), {}, lambda node: None)


class Made(nn.Module):
    """A tensor that is made while the model is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_a_constant_whose_numbers_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.frontend import capture as module

    lost = {"c": torch.empty(2, device="meta")}
    exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(TraceError, match="whose numbers are lost"):
        module._constant(exported, "c", lost)
    with pytest.raises(TraceError, match="whose numbers are lost"):
        module._constant(exported, "nowhere", {})
    program = capture(open_source(Made()), {"0": torch.randn(2, 4)})
    assert any(value.tolist() == [1, 2, 3, 4] for value in program.constants.values())


def test_blocks_that_no_field_of_the_config_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_COUNTS", ("number_of_floors",))
    with pytest.raises(BackendError, match="no field of its config that counts its 2 blocks"):
        sparsify.compile(
            save("llama", tmp_path / "model"),
            ["llm-pruner:50%,granularity=layer,importance=l2"],
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_a_smaller_model_that_is_another_one_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.structure import restructure

    folder, spec = save("llama", tmp_path / "model"), "llm-pruner:50%,importance=l2"
    opened: Any = restructure.open_source

    def other(*names: Any, **more: Any) -> Any:
        source = opened(*names, **more)
        store = source.weights.store
        monkeypatch.setattr(store, "read", lambda name, read=store.read: read(name) + (name == "model.norm.weight"))
        return source

    monkeypatch.setattr(restructure, "open_source", other)
    with pytest.raises(BackendError, match=r"model\.norm\.weight is another one"):
        sparsify.compile(folder, [spec], output=tmp_path / "out")
    monkeypatch.setattr(restructure, "open_source", opened)
    monkeypatch.setattr(restructure, "difference", lambda one, two: "add is not sub")
    with pytest.raises(BackendError, match=r"computes otherwise \(add is not sub\)"):
        sparsify.compile(folder, [spec], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backend_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.frontend import source

    def broken(*names: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source, "copy_companions", broken)
    with pytest.raises(BackendError, match="No space left"):
        sparsify.compile(save("llama", tmp_path / "model"), ["magnitude:2:4"], output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith("lock")] == ["model"]


def test_no_room_for_a_module_is_told_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed is the size of its parameters, and a little more."""
    import shutil
    from types import SimpleNamespace

    from sparsify.backends.hf import job

    monkeypatch.setattr(job, "_BESIDE", 1000)
    model = build("llama")
    need = sum(p.numel() * 4 for p in model.parameters()) + 1000
    for free, enough in ((need - 1, False), (need, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if enough:
            sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")
        else:
            with pytest.raises(BackendError, match="needed"):
                sparsify.compile(model, ["magnitude:2:4"], output=tmp_path / "out")


def test_an_error_that_nobody_foresaw_comes_as_it_is_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify.frontend import source

    def broken(*names: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(source, "copy_companions", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        sparsify.compile(save("llama", tmp_path / "model"), ["magnitude:2:4"], output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith("lock")] == ["model"]
