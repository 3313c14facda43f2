"""Both sides of every size at which reading or writing a file goes on in another piece, and of a failure on the way."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify import tensors
from sparsify.backends.hf.saving import save_tensors
from sparsify.errors import BackendError, CheckpointError
from sparsify.files.checkpoint import DTYPES, INDEX, WEIGHTS, Checkpoint
from sparsify.files.staging import Staging
from sparsify.files.writer import lay_out, lay_out_files, layout_from_json, layout_of, layout_to_json
from sparsify.tensors import all_finite, digest, digest_of_span, read_into, write_from


def blake(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


@pytest.mark.parametrize("piece", [1, 7, 39, 40, 41])
def test_tensors_in_pieces(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_AT_ONCE", piece)
    monkeypatch.setattr(tensors, "_PIECE", piece)
    value, back = torch.arange(10.0), torch.empty(10)
    with (tmp_path / "x").open("w+b", buffering=0) as file:
        write_from(file.fileno(), value, 3)
        read_into(file.fileno(), back, 3)
        assert torch.equal(back, value)
        with pytest.raises(EOFError, match="1 bytes are missing"):
            read_into(file.fileno(), back, 4)
    content = (tmp_path / "x").read_bytes()
    assert content == bytes(3) + value.numpy().tobytes()
    assert (
        digest_of_span(tmp_path / "x", 3, 40)
        == digest_of_span(tmp_path / "x", 3)
        == digest(value)
        == blake(content[3:])
    )
    assert digest_of_span(tmp_path / "x", 4, 8) == blake(content[4:12])
    with pytest.raises(EOFError, match="missing"):
        digest_of_span(tmp_path / "x", 4, 40)
    assert digest(value, tensors.CRC) == f"{zlib.crc32(content[3:]):08x}"


@pytest.mark.parametrize(("shard", "files"), [(39, 3), (40, 2), (79, 2), (80, 1), (1, 3)])
def test_a_new_file_begins_where_one_is_full(shard: int, files: int, tmp_path: Path) -> None:
    kinds = {"a": (torch.float32, (5,)), "b": (torch.float32, (5,)), "c": (torch.bfloat16, (4, 5))}
    checkpoint = lay_out(tmp_path, kinds, shard)
    assert len(checkpoint.files) == files and list(checkpoint.names()) == ["a", "b", "c"]
    for name, (dtype, shape) in kinds.items():
        checkpoint.write(name, torch.ones(shape, dtype=dtype))
    assert all(bool((Checkpoint(tmp_path).read(name) == 1).all()) for name in kinds)


def test_every_file_is_filled_as_far_as_the_first(tmp_path: Path) -> None:
    kinds = {name: (torch.int8, (size,)) for name, size in zip("abcde", (20, 20, 20, 21, 19), strict=True)}
    checkpoint = lay_out(tmp_path, kinds, 40)
    together: dict[Path, list[str]] = {}
    for name in checkpoint.names():
        together.setdefault(checkpoint.span(name)[0], []).append(name)
    assert list(together.values()) == [["a", "b"], ["c"], ["d", "e"]]


@given(
    st.dictionaries(
        st.text("abc.é", min_size=1),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3)),
    ),
    st.integers(1, 100),
)
@settings(deadline=None, max_examples=30)
def test_the_layout_of_a_folder_makes_the_same_files(kinds: dict[str, tuple[torch.dtype, list[int]]], at: int) -> None:
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        first = lay_out(Path(one), kinds, at)
        layout = layout_from_json(json.loads(json.dumps(layout_to_json(layout_of(first)))))
        assert {name: kind for tensors in layout.values() for name, kind in tensors.items()} == kinds
        second = lay_out_files(Path(other), layout or {WEIGHTS: {}})
        assert [path.name for path in first.files] == [path.name for path in second.files]
        assert [path.read_bytes() for path in first.files] == [path.read_bytes() for path in second.files]


@pytest.mark.parametrize("shards", [1, 2])
def test_an_index_is_copied_with_the_shards_that_need_it(shards: int, tmp_path: Path) -> None:
    """One shard too, where it is not called model.safetensors."""
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    table = {}
    for number in range(shards):
        file = f"model-{number}.safetensors"
        save_tensors({f"w{number}": torch.ones(3)}, tmp_path / "source" / file)
        table[f"w{number}"] = file
    (tmp_path / "source" / INDEX).write_text(json.dumps({"weight_map": table}))
    copied = Checkpoint(tmp_path / "source").copy_to(tmp_path / "out")
    assert list(copied.names()) == list(table) and copied.writable
    assert (tmp_path / "out" / INDEX).read_bytes() == (tmp_path / "source" / INDEX).read_bytes()


def test_finite_sums_that_overflow() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        most = torch.finfo(dtype).max
        values = torch.full((1000,), most, dtype=dtype)
        assert all_finite(values)
        for broken in (torch.nan, torch.inf, -torch.inf):
            values[-1] = broken
            assert not all_finite(values)


def test_a_file_that_shrinks_under_its_reader_is_named(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / WEIGHTS)
    checkpoint = Checkpoint(tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate((tmp_path / WEIGHTS).stat().st_size - 4)
    assert torch.equal(checkpoint.read("a"), torch.ones(4))
    for read in (checkpoint.read, checkpoint.digest):
        with pytest.raises(CheckpointError, match=r"reading b: model\.safetensors ended early"):
            read("b")


@pytest.mark.parametrize("at", [1, 2])
def test_a_commit_that_fails_leaves_the_older_output_whole(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its renames fails."""
    import os

    out, rename, calls = tmp_path / "out", os.rename, []
    out.mkdir()
    (out / "sparsify.json").write_text("old")

    def failing(*names: object, **more: object) -> None:
        calls.append(names)
        if len(calls) == at:
            raise PermissionError(13, "not allowed")
        rename(*names, **more)  # type: ignore[call-overload]

    def commit() -> None:
        with Staging(out, overwrite=True) as staging:
            (staging.folder / "new").write_text("new")
            monkeypatch.setattr(os, "rename", failing)
            staging.commit()

    try:
        commit()
        assert not calls, "a commit that tells nobody of its failure"
    except BackendError as error:
        assert "cannot be put in place" in str(error)
        assert [p.name for p in out.iterdir()] == ["sparsify.json"] and (out / "sparsify.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith("lock")] == ["out"]
