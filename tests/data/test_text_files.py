"""Files of text as people have them: marks, encodings, lists, compressed; and errors that say which of it is wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.data import opening
from sparsify.data.opening import list_as_lines, open_text
from sparsify.data.rows import Lines
from sparsify.data.sources import read_documents
from sparsify.data.texts import LongText
from sparsify.errors import CalibrationError

ROWS = [{"text": f"café number {i} €"} for i in range(5)]
TEXTS = [row["text"] for row in ROWS]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def stored(kind: str, text: str) -> bytes:
    if kind == "gz":
        return gzip.compress(text.encode())
    if kind == "two gz":
        return gzip.compress(text[:40].encode()) + gzip.compress(text[40:].encode())
    if kind == "zst":
        return zstd(text.encode())
    if kind == "gz of utf-16":
        return gzip.compress(text.encode("utf-16"))
    return text.encode(kind)


KINDS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gz", "two gz", "zst", "gz of utf-16"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES + "\n"),
        ("list.json", json.dumps(ROWS, ensure_ascii=False)),
        ("pretty.json", json.dumps(ROWS, ensure_ascii=False, indent=1)),
        ("texts.json", json.dumps(TEXTS)),
        ("texts.jsonl", "\n".join(map(json.dumps, TEXTS))),
    ],
)
def test_documents_are_the_same_however_they_lie(name: str, text: str, kind: str, tmp_path: Path) -> None:
    name += {"gz": ".gz", "zst": ".zst"}.get(kind, "")
    (tmp_path / name).write_bytes(stored(kind, text))
    found = read_documents(f"{tmp_path}/{name}", "calibration").documents
    assert list(found) == TEXTS and [found[i] for i in (4, 0, -1)] == [TEXTS[4], TEXTS[0], TEXTS[4]]


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_same_however_it_lies(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "un café,\ndeux\n" * 500
    path = tmp_path / "a.txt"
    path.write_bytes(stored(kind, text.replace("\n", "\r\n")))
    assert list(read_documents(str(path), "calibration").documents) == [text]
    monkeypatch.setattr("sparsify.data.texts.WHOLE", 1000)
    (found,) = read_documents(str(path), "calibration").documents
    assert isinstance(found, LongText) and "".join(found.chunks()) == text
    assert found.at(100, 50) in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", LINES.encode("latin-1", "replace"), r"not a UTF-8 text file: line 1, byte 13 \(0xe9\) is none"),
        ("b.txt", "plain\nand caf\xe9\n".encode("latin-1"), r"line 2, byte 13 \(0xe9\) is none. Save it as UTF-8"),
        ("list.json", b'[{"text": "ok"},\n {"text": "caf\xe9"}]', r"line 2, byte 31 \(0xe9\)"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-20], "cannot be decompressed"),
        ("b.txt.gz", b"\x1f\x8b\x08\x00nonsense that is no stream", "cannot be decompressed"),
        ("a.zst", b"\x28\xb5\x2f\xfd and nothing of the kind", "cannot be decompressed"),
        ("16.txt", b"\xff\xfea\x00\x00", "its byte-order mark says utf-16-le, and bytes from 5 on are none"),
        (
            "no.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 3}\n',
            r"line 2 has no field 'text', but 'body', 'id'\. Name it",
        ),
        ("other.jsonl", b'{"body": "b"}\n', "line 1 has no field 'text', but 'body'"),
        ("number.jsonl", b"3\n", "line 1 is a number, not a table with a field 'text'. Every line is a text, or"),
        (
            "nest.json",
            b'[["a", "b"], ["c"]]',
            "item 1 is a list of 2, with text first, not a table .*Every item is a text",
        ),
        ("ids.json", b"[[1, 2]]", "item 1 is a list of 2, with a number first, not a table"),
        ("texts.jsonl", b'{"text": ["a"]}', "line 1': a list of 1, with text first. A document is text"),
        ("true.jsonl", b'{"text": true}', "line 1': true or false. A document"),
        (
            "u16.txt",
            "ab\ncd".encode("utf-16-le"),
            r"not a UTF-8 text file: line 1, byte 1 \(0x00\) is NUL, as in UTF-16",
        ),
        ("u16be.txt", "ab\ncd".encode("utf-16-be"), r"line 1, byte 0 \(0x00\) is NUL"),
        ("u32.txt", "ab".encode("utf-32-le"), r"line 1, byte 1 \(0x00\) is NUL"),
        ("nul.txt", b"two words\nof\0them", r"line 2, byte 12 \(0x00\) is NUL"),
        ("nul.txt.gz", gzip.compress(b"two\0words", mtime=0), r"line 1, byte 3 \(0x00\) is NUL"),
        ("u16.jsonl", LINES.encode("utf-16-le"), r"line 1, byte 1 \(0x00\) is NUL"),
        ("u16list.json", json.dumps(ROWS).encode("utf-16-le"), r"line 1, byte 1 \(0x00\) is NUL"),
        ("raw.jsonl", b'{"text": "a"}\n{"text": "b\0"}\n', r"line 2, byte 25 \(0x00\) is NUL"),
        ("escaped.jsonl", b'"a"\n"b\\u0000"\n', r"line 2': a NUL \(\\u0000\) at character 2 of a text"),
        ("pair.jsonl", b'{"prompt": "a", "completion": "b"}\n', "Write what the model sees into one field"),
        ("null.jsonl", b'{"text": null}\n', "line 1': null. A document is text"),
        ("cut.json", b'[{"text": "a"}, {"text":', "item 2 is not JSON"),
        ("open.json", b'[{"text": "a"}, {"text": "b"}', "'' behind item 2"),
        ("comma.json", b'[{"text": "a"},]', "item 2 is not JSON"),
        ("more.json", b'[{"text": "a"}]\n[{"text": "b"}]', "something behind the list"),
        ("field.json", b'[{"text": "a"}, {"body": "b"}]', "item 2 has no field 'text', but 'body'"),
        ("table.json", b'{\n "text": "a"\n}', "line 1 is not JSON"),
        ("deep.json", b"[" * 100000, "item 1 is not JSON"),
        ("none.json", b" [ ] \n", "no documents in it"),
    ],
)
def test_what_is_wrong_is_said(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    if name.endswith(".zst"):
        zstd(b"")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        read_documents(f"{tmp_path}/{name}", "calibration")


def test_a_nul_far_on_in_a_long_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a word\n" * 200_000 + b"\0")
    (found,) = read_documents(f"{tmp_path}/a.txt", "calibration").documents
    assert isinstance(found, LongText)
    for read in (lambda: list(found.chunks()), lambda: found.at(1_390_000, 20_000)):
        with pytest.raises(CalibrationError, match=r"line 200001, byte 1400000 \(0x00\) is NUL"):
            read()


def test_a_nul_in_a_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["one", "t\0o"]}), tmp_path / "a.parquet")
    found = read_documents(f"{tmp_path}/a.parquet", "calibration").documents
    for read in (lambda: found[1], lambda: list(found)):
        with pytest.raises(CalibrationError, match=r"a\.parquet:text, row 2': a NUL .* at character 2"):
            read()


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_bombs(compress: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = compress(b"a" * (3 << 20))
    (tmp_path / "a.txt.gz").write_bytes(bomb)
    monkeypatch.setattr(opening, "SMALL", 2 << 20)
    monkeypatch.setattr(opening, "MAX_RATIO", 2)
    with pytest.raises(CalibrationError, match=f"{len(bomb)} bytes that decompress to more than {2 << 20}"):
        read_documents(f"{tmp_path}/a.txt.gz", "calibration")


def test_a_file_that_reads_zstd_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"text"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match="pyarrow, which reads zstd, is not installed"):
        read_documents(f"{tmp_path}/a.txt.zst", "calibration")


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 16])
def test_lists_whatever_is_read_at_once(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_CHUNK", chunk)
    items: list[Any] = [
        {"text": 'a "quoted" [text], \\ and €'},
        "b]",
        {"text": "x" * 300},
        [1, 2],
        17,
        True,
        None,
        -1.5,
    ]
    (tmp_path / "a.json").write_text("\n \t[" + " ,\n".join(json.dumps(i, ensure_ascii=False) for i in items) + " ] ")
    lines = list_as_lines(open_text(tmp_path / "a.json"))
    assert lines is not None and [json.loads(line) for _, line in lines.lines()] == items
    (tmp_path / "b.json").write_text("  \n{}")
    assert list_as_lines(open_text(tmp_path / "b.json")) is None


@pytest.mark.parametrize("chunk", [1, 3, 1 << 16])
def test_lines_from_any_place(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_CHUNK", chunk)
    data = b"one\n\ntwo\r\nthree"
    (tmp_path / "a").write_bytes(data)
    text = open_text(tmp_path / "a")
    assert list(text.lines()) == [(0, b"one\n"), (4, b"\n"), (5, b"two\r\n"), (10, b"three")]
    assert list(text.lines(5)) == [(5, b"two\r\n"), (10, b"three")] and list(text.lines(len(data))) == []


def test_a_line_that_is_too_long_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MAX_LINE", 1000)
    monkeypatch.setattr("sparsify.data.rows.MAX_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 2000 + b'"}\n')
    with pytest.raises(CalibrationError, match="line 2 is longer than 1000 bytes"):
        Lines(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_bytes(b'["a", "' + b"x" * 300000 + b'"]')
    with pytest.raises(CalibrationError, match="item 2 is longer than 1000 bytes"):
        Lines(tmp_path / "b.json")
