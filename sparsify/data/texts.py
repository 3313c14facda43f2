"""Text too long to tokenise at once, in pieces: a tokenizer takes a hundred bytes of memory for each character.

A document of at most ``WHOLE`` bytes is text and tokenised whole. A longer one is a :class:`LongText`.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.data.opening import not_utf8, open_text
from sparsify.errors import CalibrationError

# Bytes of text that are tokenised at once; of a longer text so many at a time (a window may ask for more).
WHOLE, PIECE = 1 << 20, 1 << 16

# Where tokenizers begin anew: behind the end of a line and before a space, both between words. What a run of spaces or
# empty lines becomes depends on what follows it.
_LINE = re.compile(r"(?<=\S\n)(?=\S)")
_WORD = re.compile(r"(?<=\S)(?= \S)")


@dataclass(frozen=True)
class LongText:
    """A text of ``size`` bytes of UTF-8, more than ``WHOLE``, of which only what is asked for is read.

    Attributes:
        read: so many bytes from a position on, fewer at the end.
        name: what it is called in errors. ``file``: line ends of all systems are read as ``\\n``, as by Python.
        wrong: the error where it is not UTF-8, or has a NUL.
    """

    size: int
    read: Callable[[int, int], bytes]
    name: str
    file: bool = False
    wrong: Callable[[str], CalibrationError] = field(default=lambda name: not_utf8(name, "some of it"), compare=False)

    def at(self, start: int, count: int) -> str:
        """Some ``count`` bytes from byte ``start`` on, less what precedes the first line or word that begins there.

        Raises:
            CalibrationError: they are not UTF-8, or hold a NUL.
        """
        data = self.read(start, count)
        half = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), len(data[:4])) if start else 0
        text = self._decode(self._decoder(), data[half:])
        begin = 0
        if start:
            middle = len(text) // 2
            found = _LINE.search(text, 0, middle) or _WORD.search(text, 0, middle)
            begin = found.end() if found else 0
        return text[begin:]

    def chunks(self) -> Iterator[str]:
        """All of it, in order.

        Raises:
            CalibrationError: it is not UTF-8, or holds a NUL.
        """
        decoder = self._decoder()
        for start in range(0, self.size, PIECE):
            yield self._decode(decoder, self.read(start, PIECE), final=start + PIECE >= self.size)

    def _decoder(self) -> io.IncrementalNewlineDecoder:
        return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=self.file)

    def _decode(self, decoder: io.IncrementalNewlineDecoder, data: bytes, final: bool = False) -> str:
        try:
            text = decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise self.wrong(self.name) from error
        if "\0" in text:
            raise self.wrong(self.name)
        return text


def text_of_file(path: Path) -> str | LongText:
    """The text of a file, and no more than its beginning read if it is long.

    Raises:
        CalibrationError: what was read is not UTF-8, or holds a NUL. OSError: it cannot be read.
    """
    held = open_text(path)
    text = LongText(held.size, held.read, str(path), file=True, wrong=lambda _: held.not_utf8())
    if held.size > WHOLE:
        text.at(0, WHOLE)
        return text
    return "".join(text.chunks())


def text_in_memory(text: str, name: str) -> str | LongText:
    """``text`` itself, or in pieces if it is long."""
    if len(text) <= WHOLE // 4:
        return text
    data = text.encode()
    if len(data) <= WHOLE:
        return text
    return LongText(len(data), lambda start, count: data[start : start + count], name)


def joined(texts: Iterable[str | LongText], between: str) -> Iterator[str]:
    """``between.join(texts)``, a chunk at a time."""
    for number, text in enumerate(texts):
        if number:
            yield between
        if isinstance(text, str):
            yield text
        else:
            yield from text.chunks()


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The text that ``chunks`` are of, cut anew every ``PIECE`` characters or somewhat before.

    Cut before the last space between two words; else behind the last end of a line between two (some tokenizers take
    that for a space of its own where nothing follows); else anywhere.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        begin = 0
        while len(held) - begin > PIECE:
            end = _cut(held, begin)
            yield held[begin:end]
            begin = end
        held = held[begin:]
    if held:
        yield held


def _cut(text: str, begin: int) -> int:
    stop = begin + PIECE
    for kind in (_WORD, _LINE):
        # The last one is near the end, as a rule.
        for start in (stop - 4096, begin):
            ends = [found.end() for found in kind.finditer(text, max(start, begin), stop + 1)]
            if ends := [end for end in ends if begin < end <= stop]:
                return ends[-1]
    return stop
