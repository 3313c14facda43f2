"""Both sides of every size at which an ONNX folder is looked at otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.backends.onnx.notes import storage_notes
from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.storage.store import _MATRIX, GraphStore
from sparsify.backends.onnx.storage.stored import StoredWeight
from sparsify.backends.verify import runtime_weights as module
from sparsify.backends.verify.runtime_weights import runtime_weights


@pytest.mark.parametrize("held", [1, 20_000, 256 << 20])
def test_weights_are_asked_of_the_runtime_some_at_a_time(
    held: int, written: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = GraphStore(written("llama", "onnx") / "model.onnx")
    names = [name for name in store.names() if "proj" in name]
    monkeypatch.setattr(module, "_AT_ONCE", held)
    found = dict(runtime_weights(store, names))
    assert list(found) == names and len(names) == 14
    assert all(torch.equal(value, store.read(name)) for name, value in found.items())


@pytest.mark.parametrize(("rows", "counts"), [(15, False), (16, True), (17, True)])
def test_small_matrices_inside_a_graph_are_no_weights(rows: int, counts: bool, tmp_path: Path) -> None:
    """From 256 numbers on they are."""
    assert _MATRIX == 16 * 16
    net = torch.nn.Linear(16, rows, bias=False)
    torch.onnx.export(net, (torch.randn(2, 16),), tmp_path / "x.onnx", dynamo=True, verbose=False, external_data=False)
    assert len(GraphStore(tmp_path / "x.onnx").inline()) == counts


@pytest.mark.parametrize(("columns", "told"), [((1 << 14) - 1, False), (1 << 14, False), ((1 << 14) + 1, True)])
def test_a_weight_past_what_the_runtime_folds_is_told(columns: int, told: bool) -> None:
    """1 GiB of float32, stored in another dtype."""
    weight = StoredWeight("w", (1 << 14, columns), torch.float16, "dense", 2, 2)
    assert any("over 1 GiB" in note for note in storage_notes(Options(), [weight], None)) == told
    same = StoredWeight("w", (1 << 14, columns), torch.float32, "dense", 2, 2)
    assert not any("over 1 GiB" in note for note in storage_notes(Options(), [same], None))
