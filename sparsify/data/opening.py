"""Files of text as they are found: compressed or not, UTF-8, or UTF-16 and UTF-32 that say so, as bytes of UTF-8.

What is not UTF-8 already is written so to a temporary file without a name, within bounds, and read from there.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sparsify.errors import CalibrationError, first_line

# How many times its size a file or column may decode to, from so many bytes on. Text is made some ten times smaller.
MAX_RATIO, SMALL = 64, 64 << 20
# Bytes of one line, or of one item of a list.
MAX_LINE = 16 << 20
# Suffixes of what is decompressed; a file is known by its first bytes.
COMPRESSED = (".gz", ".zst")

_CHUNK = 1 << 16
# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class TextFile:
    """``size`` bytes of UTF-8, as they should be, that can be read from any place; ``name`` is for errors."""

    def __init__(self, file: IO[bytes], name: str, skip: int = 0) -> None:
        self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._skip, self.name = skip, name
        self.size = os.fstat(self._file).st_size - skip

    def read(self, start: int, count: int) -> bytes:
        """So many bytes from a position on, fewer at the end."""
        return os.pread(self._file, count, self._skip + start)

    def lines(self, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        """The lines from a position on, each with where it begins; of one that is too long a bit more than MAX_LINE."""
        held, at = self.read(offset, _CHUNK), 0
        following = offset + len(held)
        while True:
            end = held.find(b"\n", at)
            while end < 0 and len(held) - at <= MAX_LINE:
                more = self.read(following, max(_CHUNK, len(held) - at))
                if not more:
                    break
                end = more.find(b"\n")
                end = end if end < 0 else len(held) - at + end
                held, at, following = held[at:] + more, 0, following + len(more)
            line = held[at:] if end < 0 else held[at : end + 1]
            if not line:
                return
            yield offset, line
            offset, at = offset + len(line), at + len(line)

    def not_utf8(self) -> CalibrationError:
        """The error that names the first byte which is no UTF-8, or NUL: valid UTF-8, and in no text."""
        at, line, held = 0, 1, b""
        while True:
            piece = self.read(at + len(held), 1 << 20)
            data = held + piece
            try:
                _, used = codecs.utf_8_decode(data, "strict", not piece)
                wrong = data.find(0, 0, used)
            except UnicodeDecodeError as error:
                wrong = data.find(0, 0, error.start)
                wrong = error.start if wrong < 0 else wrong
            if wrong >= 0:
                where = f"line {line + data.count(10, 0, wrong)}, byte {at + wrong} (0x{data[wrong]:02x})"
                if data[wrong]:
                    return not_utf8(self.name, f"{where} is none")
                nul = f"{where} is NUL, as in UTF-16 or UTF-32 without a byte-order mark"
                return not_utf8(self.name, nul, "UTF-16LE")
            if not piece:
                return not_utf8(self.name, "it changed while it was read")
            at, line, held = at + used, line + data.count(10, 0, used), data[used:]


def not_utf8(name: str, where: str, usual: str = "LATIN1") -> CalibrationError:
    return CalibrationError(
        f"data '{name}'",
        found=f"not a UTF-8 text file: {where}",
        do=f"Save it as UTF-8 (iconv -f {usual} -t UTF-8, say), or name another source",
    )


def open_text(path: Path) -> TextFile:
    """The text of ``path``, decompressed and as UTF-8.

    Raises:
        CalibrationError: a compressed file that is damaged or grows out of all proportion, or text that is not what
            its byte-order mark says. OSError: it cannot be read.
    """
    name = str(path)
    with path.open("rb") as file:
        begin = file.read(4)
        stored = os.fstat(file.fileno()).st_size
        # (the file's position, which a copy of its number shares, is where decoding begins)
        file.seek(0)
        if begin[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as stream:
                return _expanded(stream.read, stored, name)
        if begin == b"\x28\xb5\x2f\xfd":
            return _expanded(_zstd(file, name), stored, name)
        return _marked(file, name)


def _expanded(read: Callable[[int], bytes], stored: int, name: str) -> TextFile:
    """What ``read`` gives bit by bit, as text."""
    done, most = 0, max(SMALL, MAX_RATIO * stored)
    with tempfile.TemporaryFile() as out:
        while True:
            try:
                piece = read(_CHUNK)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise CalibrationError(
                    f"data '{name}'", found=f"cannot be decompressed ({first_line(error)})", do="Fetch the file again"
                ) from error
            if not piece:
                out.flush()
                return _marked(out, name)
            done += len(piece)
            if done > most:
                found = f"{stored} bytes that decompress to more than {most}"
                raise CalibrationError(f"data '{name}'", found=found, do="No text is made so small: leave it")
            out.write(piece)


def _zstd(file: IO[bytes], name: str) -> Callable[[int], bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise CalibrationError(
            f"data '{name}'", found="pyarrow, which reads zstd, is not installed", do="pip install 'sparsify-fx[data]'"
        ) from error
    read: Callable[[int], bytes] = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd").read
    return read


def _marked(file: IO[bytes], name: str) -> TextFile:
    """``file`` as text: a byte-order mark says what it is in; without one it is UTF-8."""
    begin = os.pread(file.fileno(), 4, 0)
    mark, encoding = next((known for known in _MARKS if begin.startswith(known[0])), (b"", "utf-8"))
    if encoding == "utf-8":
        return TextFile(file, name, len(mark))
    decoder, at = codecs.getincrementaldecoder(encoding)(), len(mark)
    with tempfile.TemporaryFile() as out:
        while True:
            piece = os.pread(file.fileno(), _CHUNK, at)
            try:
                out.write(decoder.decode(piece, not piece).encode())
            except UnicodeError as error:
                found = f"its byte-order mark says {encoding}, and bytes from {at} on are none ({first_line(error)})"
                raise CalibrationError(f"data '{name}'", found=found, do="Save it as UTF-8") from error
            if not piece:
                out.flush()
                return TextFile(out, name)
            at += len(piece)


def list_as_lines(text: TextFile) -> TextFile | None:
    """The items of a file that is one JSON list, one a line; None where it begins otherwise.

    Raises:
        CalibrationError: no JSON, an item that is too long, or something behind the list.
    """
    begin = next((part[:1] for start in range(0, text.size, 64) if (part := text.read(start, 64).lstrip())), b"")
    if begin != b"[":
        return None
    with tempfile.TemporaryFile() as out:
        for item in _items(text):
            out.write(json.dumps(item).encode() + b"\n")
        out.flush()
        return TextFile(out, text.name)


def _items(text: TextFile) -> Iterator[Any]:
    decoder, reading = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    held, at, taken, number = "", 0, 0, 0

    def more(count: int) -> bool:
        nonlocal held, at, taken
        piece = text.read(taken, count)
        taken += len(piece)
        try:
            new = reading.decode(piece, not piece)
        except UnicodeDecodeError as error:
            raise text.not_utf8() from error
        if piece:
            held, at = held[at:] + new, 0
        return bool(piece)

    def sign() -> str:
        """The next character that is no space, not taken yet; "" at the end."""
        nonlocal at
        while True:
            while at < len(held) and held[at] in " \t\r\n":
                at += 1
            if at < len(held):
                return held[at]
            if not more(_CHUNK):
                return ""

    sign()
    at += 1
    while sign() != "]" or number:
        number += 1
        while True:
            wrong: Exception | None = None
            try:
                sign()
                item, end = decoder.raw_decode(held, at)
            except (ValueError, RecursionError) as error:
                wrong = error
            # What ends with what was read may go on behind it.
            if (wrong is None and end < len(held)) or len(held) - at > MAX_LINE or not more(max(_CHUNK, len(held))):
                break
        if len(held) - at > MAX_LINE and (wrong is not None or end - at > MAX_LINE):
            raise _not_a_list(text, f"item {number} is longer than {MAX_LINE} bytes, or no JSON")
        if wrong is not None:
            if "\0" in held:
                raise text.not_utf8()
            raise _not_a_list(text, f"item {number} is not JSON ({first_line(wrong)})")
        at = end
        yield item
        if (found := sign()) not in ("]", ","):
            raise _not_a_list(text, f"{found!r} behind item {number}, not ',' or ']'")
        at += 1
        if found == "]":
            break
    else:
        at += 1
    if sign():
        raise _not_a_list(text, "something behind the list")


def _not_a_list(text: TextFile, found: str) -> CalibrationError:
    return CalibrationError(f"data '{text.name}'", found=found, do="Give one JSON list, or one JSON object a line")
