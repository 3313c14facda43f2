from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import INDEX, WEIGHTS, Checkpoint
from sparsify.ir.store import MemoryStore


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(4, 2, generator=generator).bfloat16(),
        "c": torch.arange(7),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }


def test_reads_what_safetensors_wrote(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / WEIGHTS)
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.dtype(name) == tensor.dtype and checkpoint.shape(name) == tensor.shape


def test_a_write_changes_that_tensor_and_no_other_byte(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / WEIGHTS)
    before = (tmp_path / WEIGHTS).read_bytes()
    checkpoint = Checkpoint(tmp_path, writable=True)
    new = torch.zeros(4, 2, dtype=torch.bfloat16)
    checkpoint.write("b.weight", new)
    after = (tmp_path / WEIGHTS).read_bytes()
    _, start, size = checkpoint.span("b.weight")
    assert after[start : start + size] == bytes(size)
    assert before[:start] + before[start + size :] == after[:start] + after[start + size :]
    assert torch.equal(Checkpoint(tmp_path).read("b.weight"), new)


def test_a_source_is_never_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="is a source"):
        Checkpoint(tmp_path).write("c", torch.zeros(7, dtype=torch.long))


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(5, 3), torch.zeros(2, 5), torch.zeros(3, 6), torch.zeros(15), torch.zeros(3, 5, dtype=torch.float16)],
)
def test_a_write_of_another_shape_or_dtype_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], wrong: torch.Tensor
) -> None:
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="shape or dtype"):
        Checkpoint(tmp_path, writable=True).write("a.weight", wrong)


def shard(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    names = list(tensors)
    files = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, content in files.items():
        save_file({name: tensors[name] for name in content}, folder / file)
    table = {name: file for file, content in files.items() for name in content}
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return table


def test_shards_read_as_one(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard(tmp_path, tensors)
    checkpoint = Checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("place", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".."])
def test_an_index_may_not_leave_the_folder(tmp_path: Path, tensors: dict[str, torch.Tensor], place: str) -> None:
    table = shard(tmp_path, tensors)
    table["c"] = place
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index(tmp_path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    shard(tmp_path, tensors)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"not a weight index|not JSON|no table"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard(tmp_path, tensors)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-2\.safetensors .*no such file"):
        Checkpoint(tmp_path)


def test_a_tensor_that_the_index_misplaces_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    table = shard(tmp_path, tensors)
    table["c"] = "model-1.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match=r"tensor c: .*model-1\.safetensors, which does not hold it"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard(tmp_path, tensors)
    save_file(tensors, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="in both"):
        Checkpoint(tmp_path)


def header(entries: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def f32(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def test_a_dtype_that_torch_has_not_here_is_named(tmp_path: Path) -> None:
    entry = {"dtype": "U16", "shape": [4], "data_offsets": [0, 8]}
    (tmp_path / WEIGHTS).write_bytes(header({"a": entry}, bytes(8)))
    with pytest.raises(CheckpointError, match=r"tensor a in model\.safetensors: dtype U16, which has no torch"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header({"a": f32(0, 8)}, bytes(4)),
        header({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)),
        header({"a": f32(0, 8), "b": f32(16, 24)}, bytes(24)),
        header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        b"\x05\x00\x00\x00\x00\x00\x00\x00{{{{{",
    ],
    ids=["empty", "huge-header", "truncated", "overlap", "hole", "dtype", "size", "not-json"],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_no_folder_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="a file"):
        Checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint(tmp_path)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--allow-bin"):
        Checkpoint(tmp_path)


def test_a_memory_store_lies_over_its_base(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / WEIGHTS)
    store = MemoryStore(Checkpoint(tmp_path))
    store.write("c", torch.zeros(7, dtype=torch.long))
    assert int(store.read("c").sum()) == 0
    assert torch.equal(store.read("a.weight"), tensors["a.weight"])
    assert set(store.names()) == set(tensors)
