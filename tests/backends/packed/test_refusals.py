"""Every refusal of packed folders that other tests do not meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import save
from support.folders import SMALLEST
from torch import Tensor, nn

import sparsify
from sparsify.backends.bench.loading import measure_loading
from sparsify.backends.packed import job
from sparsify.backends.packed.choosing import Asked
from sparsify.backends.packed.loaded.loading import load_model
from sparsify.backends.packed.plan import decide
from sparsify.backends.packed.store import open_packed
from sparsify.errors import BackendError, CheckpointError, TraceError
from sparsify.files.ledger import Ledger
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source


def test_a_weight_that_two_layers_hold_stays_dense() -> None:
    """transformers ties the two again when it has loaded them: detectors whose heads of all layers are one."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.own = (nn.Linear(64, 64) for _ in range(3))
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.other(self.one(x)))  # type: ignore[no-any-return]

    source = open_source(Heads())
    program = capture(source, {"0": torch.zeros(2, 64)})
    asked = Asked("bitmask", "smallest")
    found = {d.name: d.reason for d in decide(program, program.weights, source.module, asked)}
    assert found["one.weight"] == "shared with other.weight" and "shared" not in (found["own.weight"] or "")


@pytest.mark.slow
def test_folders_that_transformers_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers refuses it"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        measure_loading(tmp_path)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "ordinary"])
def test_nothing_is_drawn_for_a_parameter_that_is_missing(packed: bool, tmp_path: Path) -> None:
    """Bytes that nobody compares may be others, and are all there."""
    folder = save("llama", tmp_path / "dense")
    if packed:
        folder = sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out", to=SMALLEST).output
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its files hold no model\.norm\.weight"):
        load_model(folder, check=False)


def test_a_packed_folder_is_only_read(tmp_path: Path) -> None:
    sparsify.compile(save("llama", tmp_path / "dense"), ["magnitude:2:4"], output=tmp_path / "out", to=SMALLEST)
    store = open_packed(tmp_path / "out", Ledger.of(tmp_path / "out"))
    assert store is not None
    with pytest.raises(CheckpointError, match=r"a packed folder\. Write to an output"):
        store.write("lm_head.weight", torch.zeros(1))


def test_a_packed_model_that_is_not_right_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save("llama", tmp_path / "dense")

    def attempt(says: str) -> None:
        with pytest.raises(BackendError, match=says):
            sparsify.compile(dense, ["magnitude:2:4"], output=tmp_path / "out", to=SMALLEST, journal=False)
        assert [p.name for p in tmp_path.iterdir() if not p.name.endswith("lock")] == ["dense"]

    with monkeypatch.context() as patched:
        patched.setattr(job, "differences", lambda *given: [("w", "differs", "Look at the disk")])
        attempt(r"w differs\. Look at the disk; no output was left")

    def refuse(*given: Any) -> None:
        raise TraceError("x", found="a product by hand", do="y")

    with monkeypatch.context() as patched:
        patched.setattr(job, "export", refuse)
        attempt(r"does not run with packed layers \(a product by hand\)")


@pytest.mark.parametrize("to", ["packed", "packed:choice=smallest", "cuda"])
def test_a_prune_is_written_where_nothing_is_worth_packing(to: str, tmp_path: Path) -> None:
    """A few zeros make nothing smaller, nor faster: the folder is an ordinary one, and says why."""
    dense = save("llama", tmp_path / "dense")
    made = sparsify.compile(dense, ["magnitude:3%"], output=tmp_path / "out", to=to)
    assert "no weight is worth packing" in made.notes[0] and "OUT is an ordinary checkpoint" in made.notes[0]
    plain = sparsify.compile(dense, ["magnitude:3%"], output=tmp_path / "plain")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    left = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert "quantization_config" not in config and "packed" not in left and len(left["not_packed"]["sites"]) == 15
    assert torch.equal(made.weight("lm_head.weight"), plain.weight("lm_head.weight"))
    with pytest.raises(BackendError, match=r"no weight is worth packing .*rune it"):
        sparsify.compile(dense, output=tmp_path / "other", to=to)
