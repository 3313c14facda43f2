"""The backend ``hf``: a copy of the source with the pruned tensors in it, checked before it appears."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparsify
from sparsify.backends.hf import job
from sparsify.backends.hf.saving import save_tensors
from sparsify.errors import BackendError
from sparsify.files.checkpoint import Checkpoint

NAME = "model.layers.0.mlp.down_proj.weight"


def flip(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """One bit of a tensor changed in its file."""
    path, start, _ = checkpoint.span(name)
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)
    return checkpoint


def test_what_was_not_pruned_keeps_every_byte(folder: Callable[[str], Path], tmp_path: Path) -> None:
    sparsify.compile(folder("llama"), ["magnitude:2:4"], only=["*.0.mlp.*"], output=tmp_path / "out")
    before, after = Checkpoint(folder("llama")), Checkpoint(tmp_path / "out")
    assert list(before.names()) == list(after.names())
    other = {name for name in before.names() if before.digest(name) != after.digest(name)}
    assert other == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_a_copy_that_went_wrong_is_refused_and_no_output_is_left(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Checkpoint.copy_to
    monkeypatch.setattr(Checkpoint, "copy_to", lambda source, into: flip(copy(source, into), "model.norm.weight"))
    with pytest.raises(BackendError, match=r"tensor model\.norm\.weight reads back otherwise than it was written"):
        sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "out")
    # What was pruned is kept, for --resume.
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == [".out.unfinished"]


def test_a_pruned_tensor_that_reads_back_otherwise_is_refused(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = job.HuggingFaceJob.verify

    def damaged(self: job.HuggingFaceJob) -> dict[str, str]:
        flip(self.store, NAME)
        return verify(self)

    monkeypatch.setattr(job.HuggingFaceJob, "verify", damaged)
    with pytest.raises(BackendError, match=r"down_proj\.weight reads back otherwise"):
        sparsify.compile(folder("llama"), ["magnitude:2:4"], output=tmp_path / "out")
    # What was pruned is kept, for --resume.
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == [".out.unfinished"]


def test_a_module_of_the_users_own_with_shared_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    # Two parameters that are two views of one memory.
    both = torch.randn(16, 8)
    net[0].weight, net[2].weight = nn.Parameter(both[:8]), nn.Parameter(both[8:])
    sparsify.compile(net, ["magnitude:2:4"], calibration=[torch.randn(4, 8)], output=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {"0.weight", "2.weight"}
    assert all(int((weight != 0).sum()) == 32 for weight in found.values())


def test_one_tensor_under_two_names_is_written_twice(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    save_tensors({"one": tensor, "other": tensor, "none": tensor[:0]}, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["one"], tensor) and torch.equal(found["other"], tensor) and not found["none"].numel()


@pytest.mark.parametrize("names", list(permutations("abc")), ids="".join)
def test_one_tensor_under_three_names_in_any_order(tmp_path: Path, names: tuple[str, ...]) -> None:
    tensor = torch.arange(6.0)
    save_tensors(dict.fromkeys(names, tensor), tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == set(names) and all(torch.equal(value, tensor) for value in found.values())
