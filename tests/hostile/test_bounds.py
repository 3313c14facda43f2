"""Small files that ask for much: each ends soon, within little memory, in one of our errors."""

from __future__ import annotations

import json
import os
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import save

from sparsify.data import rows
from sparsify.data.batches import expected_batch, load_calibration
from sparsify.data.pictures import images
from sparsify.data.pictures.images import read_images
from sparsify.data.sources import Documents, read_documents
from sparsify.data.texts import LongText
from sparsify.data.windows import random_windows
from sparsify.errors import CalibrationError, CheckpointError, SparsifyError
from sparsify.frontend.source import open_source

# Memory that a refusal may take beyond what the process has.
MORE = 600 << 20


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Stop what asks for much more, as MemoryError or as another library's."""
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (have + MORE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def refused(data: Any, says: str, split: Any = "calibration") -> None:
    with pytest.raises(CalibrationError) as caught:
        list(read_documents(str(data), split).documents)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.safetensors", "a"])
def test_only_regular_files_are_data(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "no regular file")
    monkeypatch.chdir(tmp_path)
    refused(name, "no regular file")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path / name, "no regular file")


def test_a_line_without_an_end(tmp_path: Path) -> None:
    sparse(tmp_path / "a.jsonl", 1 << 40, b'{"text": "x"}\n\n{"text": "')
    refused(tmp_path / "a.jsonl", f"line 3 is longer than {rows.MAX_LINE} bytes")


@pytest.mark.parametrize("value", ["[[[", '{"a":' * 3])
def test_a_deep_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ' + value * 100_000 + "\n")
    refused(tmp_path / "a.jsonl", "line 2 is not JSON (lists or tables nested")


def test_a_text_of_a_terabyte_is_drawn_from_at_once() -> None:
    line = b"words and words\n"
    text = LongText(1 << 40, lambda start, count: (line * (count // 16 + 2))[start % 16 :][:count], "a")
    found = random_windows(Documents("a", [text]), lambda text, special=True: torch.tensor([*text.encode()]), 2, 16, 0)
    assert found.shape == (2, 16)


def test_a_hole_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    """What lies in a hole is NUL, which stands in no text; the file is not looked through for it."""
    text = sparse(tmp_path / "a.txt", 1 << 40, b"words and words\n" * 1000)
    with pytest.raises(CalibrationError, match=r"line 1001, byte 16000 \(0x00\) is NUL"):
        read_documents(str(text), "calibration")


@pytest.mark.parametrize("at", [0, 100, 1 << 20, (3 << 20) - 2])
def test_bytes_that_are_no_text_far_in_a_file(tmp_path: Path, at: int) -> None:
    data = bytearray(b"some text \n" * 300_000)[: 3 << 20]
    data[at : at + 2] = b"\xff\x80"
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(CalibrationError, match="not a UTF-8 text file"):
        for found in read_documents(str(tmp_path / "a.txt"), "heldout").documents:
            list(found.chunks())  # type: ignore[union-attr]


def test_a_parquet_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    cell = "a" * (20 << 20)
    parquet.write_table(pyarrow.table({"text": [cell, "b"]}), tmp_path / "a.parquet", compression="zstd")
    with monkeypatch.context() as patch:
        patch.setattr(rows, "SMALL", 16 << 20)
        refused(tmp_path / "a.parquet", "bytes that decode to")
    parquet.write_table(pyarrow.table({"text": [cell[: rows.MAX_DOCUMENT + 1]]}), tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", f"a text of {rows.MAX_DOCUMENT + 1} characters")
    # One text that stands in many rows is decoded once, not so many times.
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000), pyarrow.array(["a" * 500_000]))
    many = pyarrow.table({"text": column})
    parquet.write_table(many, tmp_path / "c.parquet", use_dictionary=True)
    found = read_documents(str(tmp_path / "c.parquet"), "calibration").documents
    assert len(found) == 5000 and found[4999] == "a" * 500_000
    sparse(tmp_path / "d.parquet", 1 << 40)
    with (tmp_path / "d.parquet").open("r+b") as file:
        file.write(b"PAR1")
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<I", 1 << 30) + b"PAR1")
    refused(tmp_path / "d.parquet", "a footer of 1073741824 bytes")


def test_a_header_of_a_token_file(tmp_path: Path) -> None:
    sparse(tmp_path / "a.safetensors", 1 << 40, struct.pack("<Q", 1 << 39))
    refused(tmp_path / "a.safetensors", "a header of 549755813888 bytes")
    sparse(tmp_path / "b.safetensors", 64, struct.pack("<Q", 1 << 63))
    refused(tmp_path / "b.safetensors", "no sound safetensors")
    save_file({f"t{i}": torch.zeros(1, dtype=torch.long) for i in range(1000)}, tmp_path / "c.safetensors")
    refused(tmp_path / "c.safetensors", "t0, t1, t10, t100")


def png(path: Path, width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)))


def test_images_that_are_too_many_pixels_or_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "image_processor", lambda source: lambda given, return_tensors: 1 / 0)
    source = open_source(torch.nn.Linear(1, 1))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    os.mkfifo(pictures / "fifo.png")
    (pictures / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(CalibrationError, match="no image in this folder"):
        read_images(pictures, source, 4, 0)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    for width, height in ((60_000, 60_000), (1 << 30, 1), (20_000, 8_000)):
        png(pictures / "a.png", width, height)
        with pytest.raises(CalibrationError, match=r"a\.png: .*pixels"):
            read_images(pictures, source, 4, 0)
    # PostScript would be handed to a program.
    (pictures / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(CalibrationError, match="cannot identify image file"):
        read_images(pictures, source, 4, 0)
    monkeypatch.setattr(images, "MAX_ENTRIES", 2)
    with pytest.raises(CalibrationError, match="more than 2 files"):
        read_images(pictures, source, 4, 0)


@pytest.mark.parametrize("key", ["size", "crop_size"])
def test_a_processor_that_makes_images_large(tmp_path: Path, key: str, folder: Callable[[str], Path]) -> None:
    model = save("vit", tmp_path / "model")
    settings = {"image_processor_type": "ViTImageProcessor", key: {"height": 10**6, "width": 10**6}}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "pictures").mkdir()
    png(tmp_path / "pictures" / "a.png", 8, 8)
    with pytest.raises(CalibrationError, match=f"{key} height 1000000, more than 8192"):
        load_calibration(str(tmp_path / "pictures"), open_source(model), samples=1)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "head_dim", 10**9),
        ("llama", "vocab_size", 10**9),
        ("llama", "hidden_size", 10**8),
        ("llama", "intermediate_size", 10**12),
        ("llama", "num_hidden_layers", 10**6),
        ("llama", "max_position_embeddings", 10**12),
        ("mixtral", "num_local_experts", 10**6),
        ("mixtral", "hidden_size", 10**9),
        ("t5", "num_decoder_layers", 10**6),
        ("t5", "relative_attention_num_buckets", 10**9),
        ("bert", "type_vocab_size", 10**9),
        ("vit", "image_size", 10**6),
        ("vit", "hidden_size", 10**9),
        ("convnext", "image_size", 10**6),
        ("convnext", "depths", [10**6, 1, 1, 1]),
        ("convnext", "hidden_sizes", [10**9] * 4),
        ("deepseek_v3", "head_dim", 10**9),
        ("deepseek_v3", "n_routed_experts", 10**6),
        ("mamba", "state_size", 10**9),
    ],
)
def test_a_config_that_asks_for_much(tmp_path: Path, family: str, key: str, value: Any) -> None:
    model = save(family, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError):
        expected_batch("random", open_source(model))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt"])
@pytest.mark.parametrize("kind", ["large", "fifo", "zero"])
def test_a_tokenizer_that_never_ends(tmp_path: Path, name: str, kind: str) -> None:
    model = save("llama", tmp_path / "model")
    if kind == "large":
        sparse(model / name, 2 << 30)
    elif kind == "fifo":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"more than|only regular files|outside the model's folder"):
        open_source(model).tokenizer()


@pytest.mark.parametrize(
    "name", ["generation_config.json", "chat_template.jinja", "preprocessor_config.json", "model.safetensors"]
)
def test_other_files_that_never_end(tmp_path: Path, name: str) -> None:
    model = save("llama", tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(SparsifyError):
        open_source(model)
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(SparsifyError):
        open_source(model)


@pytest.mark.slow
def test_an_index_of_a_million_names(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "model")
    (model / "model.safetensors").rename(model / "a.safetensors")
    for file in ("a.safetensors", "b{}.safetensors"):
        placed = {f"t{i}": file.format(i) for i in range(300_000)}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        with pytest.raises(CheckpointError):
            open_source(model)
