"""One source in two parts that have nothing in common, and several files as one source."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor

from sparsify.data.rows import Document
from sparsify.data.texts import WHOLE, LongText

Split = Literal["calibration", "heldout"]

# A source that has no parts of its own and serves for both is cut here: what comes behind is held out.
HELD_OUT_FROM = 0.9
# From so many documents on whole ones are held out; of fewer their lengths count, and one is cut.
_MANY = 10


@dataclass(frozen=True)
class Documents:
    """Documents and how to name where they are from.

    Attributes:
        fixed: ready-made samples (rows of token ids, all as long). packed: conversations, which are short: sequences
            are filled with as many as it takes. files: of several, the name of each and how many documents it has.
    """

    label: str
    documents: Sequence[Document]
    fixed: bool = False
    packed: bool = False
    files: tuple[tuple[str, int], ...] = ()


class Slice(Sequence[Document]):
    """The documents from ``start`` to ``stop`` of others, read when they are asked for."""

    def __init__(self, documents: Sequence[Document], start: int, stop: int) -> None:
        self.documents, self.range = documents, range(start, stop)

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, index: Any) -> Any:
        return self.documents[self.range[index]]


class Several(Sequence[Document]):
    """The documents of one sequence after the other."""

    def __init__(self, parts: Sequence[Sequence[Document]]) -> None:
        self.parts, self.starts = parts, list(accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __iter__(self) -> Iterator[Document]:
        for part in self.parts:
            yield from part

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self))[index]
        part = bisect_right(self.starts, at) - 1
        return self.parts[part][at - self.starts[part]]


def part_of(whole: Documents, split: Split) -> Documents:
    """The first nine tenths of ``whole`` for calibration, the last for holding out; always the same ones.

    Of ten documents or more whole ones are held out. Of fewer the last tenth of their bytes (of token ids: of them) is,
    and the document in which it begins is cut there, text at the end of a line or word.
    """
    own = "its first 90%" if split == "calibration" else "its last 10%, held out"
    documents, count = whole.documents, len(whole.documents)
    if count >= _MANY or whole.fixed or whole.packed:
        at = min(max(1, int(count * HELD_OUT_FROM)), max(1, count - 1))
        chosen: Sequence[Document] = Slice(documents, 0, at) if split == "calibration" else Slice(documents, at, count)
        return replace(whole, label=f"{whole.label} ({own})", documents=chosen, files=_files(whole, chosen))
    parts: tuple[list[Document], list[Document]] = [], []
    sizes = [_size(document) for document in documents]
    cut, begin = int(sum(sizes) * HELD_OUT_FROM), 0
    for document, size in zip(documents, sizes, strict=True):
        head, tail = _cut(document, min(size, max(0, cut - begin)))
        begin += size
        for part, piece in zip(parts, (head, tail), strict=True):
            if _size(piece):
                part.append(piece)
    return replace(whole, label=f"{whole.label} ({own})", documents=parts[split == "heldout"], files=())


def _files(whole: Documents, chosen: Sequence[Document]) -> tuple[tuple[str, int], ...]:
    if not isinstance(chosen, Slice):
        return ()
    found, begin = [], 0
    for name, count in whole.files:
        shared = range(max(begin, chosen.range.start), min(begin + count, chosen.range.stop))
        found.append((name, len(shared)))
        begin += count
    return tuple(found)


def _size(document: Document) -> int:
    if isinstance(document, Tensor):
        return len(document)
    return document.size if isinstance(document, LongText) else len(document.encode())


def _cut(document: Document, at: int) -> tuple[Document, Document]:
    """What is before and from ``at`` on: bytes of text, where a line or word ends at or before it; or ids."""
    if isinstance(document, Tensor):
        return document[:at], document[at:]
    text = document if isinstance(document, LongText) else _long(document)
    if not 0 < at < text.size:
        return (document, "") if at else ("", document)
    begin = max(0, at - (1 << 12))
    near = text.read(begin, at - begin)
    # The byte of a space or end of a line is that in UTF-8 and nothing else.
    end = max(near.rfind(b"\n") + 1, 0) or max(near.rfind(b" "), 0)
    if not end:
        end = len(near)
        while end and text.read(begin + end, 1)[0] & 0xC0 == 0x80:
            end -= 1
    return _range(text, 0, begin + end), _range(text, begin + end, text.size)


def _long(text: str) -> LongText:
    data = text.encode()
    return LongText(len(data), lambda start, count: data[start : start + count], "text")


def _range(text: LongText, start: int, stop: int) -> Document:
    read: Callable[[int, int], bytes] = lambda at, count: text.read(start + at, min(count, stop - start - at))  # noqa: E731
    part = replace(text, size=stop - start, read=read)
    return part if part.size > WHOLE else "".join(part.chunks())
