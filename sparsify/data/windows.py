"""Documents cut into sequences: random windows to calibrate on, disjoint ones to evaluate on.

Of long text only what the windows need is tokenised; how, docs/architecture.md says under "The calibration batches".
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Protocol

import torch
from torch import Tensor

from sparsify.context import Progress, report
from sparsify.data.parts import Documents
from sparsify.data.rows import Document
from sparsify.data.texts import PIECE, WHOLE, LongText, joined, pieces
from sparsify.errors import CalibrationError

# Tokens of drawn documents that are kept in case they are drawn again.
_KEPT = 1 << 24
# Bytes of text that are tokenised, at most, to look for documents that are long enough where most are short.
LOOKED_THROUGH = 64 << 20
# Bytes of long text for each token of a window that is cut out of it.
_BYTES_A_TOKEN = 16
_BETWEEN = "\n\n"


class Encode(Protocol):
    """A tokenizer: the ids of a text, [tokens]; with what a sequence begins and ends with unless ``special`` is off."""

    def __call__(self, text: str, special: bool = True) -> Tensor: ...


def random_windows(
    documents: Documents, encode: Encode, samples: int, length: int, seed: int, drawn: list[int] | None = None
) -> Tensor:
    """``samples`` windows of exactly ``length`` tokens, [samples, length] int64, as the papers draw them.

    A document is drawn, and drawn again until one has more than ``length`` tokens; then a uniform window of it
    (algorithms.md, section 1.5). Of a document of more than ``WHOLE`` bytes a piece is drawn, from the first line
    or word after a uniform position on, and a window of that. Rows of a token file that have exactly ``length`` tokens
    are taken as they are.

    After 64 documents that were too short all are looked at once, or so many as have ``LOOKED_THROUGH`` bytes and
    ``samples`` that are long enough, and the others are left out.

    Conversations are short: in a random order one follows the other, none twice, and sequences are cut out of that.

    Args:
        drawn: gets the number of the document that each window is from, or ends in.

    Raises:
        CalibrationError: no document is long enough, or there are too few; the message has the counts.
    """
    drawn = [] if drawn is None else drawn
    if documents.packed:
        return _packed(documents, encode, samples, length, seed, drawn)
    if documents.fixed and _count(documents.documents[0]) == length:
        rows = [documents.documents[i] for i in range(min(samples, len(documents.documents)))]
        if len(rows) < samples:
            raise _too_few(documents, f"{len(rows)} sequences of {length} tokens", samples, length)
        drawn += range(samples)
        return torch.stack([row.long() for row in rows if isinstance(row, Tensor)])
    draw = _Draw(documents.documents, encode, length, random.Random(seed))
    windows: list[Tensor] = []
    candidates: Sequence[int] = range(len(documents.documents))
    misses = 0
    while len(windows) < samples:
        report(Progress("tokenizing", len(windows), samples, documents.label))
        chosen = draw.random.choice(candidates)
        if (window := draw.window(chosen)) is not None:
            windows.append(window)
            drawn.append(chosen)
            continue
        misses += 1
        if misses == 64:
            # Long documents are rare here: look at them once instead of drawing for ever.
            candidates = draw.long_enough(samples)
        if not candidates or misses > 64 * (samples + 2):
            found = f"{len(documents.documents)} documents, the longest of {draw.longest} tokens"
            raise _too_few(documents, found, samples, length)
    return torch.stack(windows)


def _packed(documents: Documents, encode: Encode, samples: int, length: int, seed: int, drawn: list[int]) -> Tensor:
    order = list(range(len(documents.documents)))
    random.Random(seed).shuffle(order)
    held, count, windows = torch.empty(0, dtype=torch.long), 0, list[Tensor]()
    for index in order:
        document = documents.documents[index]
        ids = document if isinstance(document, Tensor) else encode("".join(joined([document], "")))
        held, count = torch.cat([held, ids.long()]), count + len(ids)
        while len(held) >= length:
            windows.append(held[:length])
            report(Progress("tokenizing", len(windows), samples, documents.label))
            drawn.append(index)
            held = held[length:]
            if len(windows) == samples:
                return torch.stack(windows)
    raise _too_few(documents, f"{len(order)} conversations, {count} tokens in all", samples, length)


class _Draw:
    """Windows of ``length`` tokens out of single documents."""

    def __init__(self, documents: Sequence[Document], encode: Encode, length: int, random: random.Random) -> None:
        self.documents, self.encode, self.length, self.random = documents, encode, length, random
        self.longest = 0
        self._known: dict[int, Tensor] = {}
        self._kept = 0

    def window(self, index: int) -> Tensor | None:
        """A random window of a document, None if it is too short."""
        ids = self._known.get(index)
        if ids is None:
            document = self.documents[index]
            ids = self._piece(document) if isinstance(document, LongText) else self._whole(document)
            self.longest = max(self.longest, len(ids))
            if isinstance(document, str) and len(ids) > self.length and self._kept + len(ids) <= _KEPT:
                self._known[index] = ids
                self._kept += len(ids)
        if len(ids) <= self.length:
            return None
        start = self.random.randint(0, len(ids) - self.length - 1)
        return ids[start : start + self.length].long()

    def long_enough(self, samples: int) -> Sequence[int]:
        """Which documents have more than ``length`` tokens."""
        found, read = array("Q"), 0
        for index, document in enumerate(self.documents):
            if isinstance(document, LongText):
                found.append(index)
                continue
            ids = self._known[index] if index in self._known else self._whole(document)
            self.longest = max(self.longest, len(ids))
            if len(ids) > self.length:
                found.append(index)
            read += len(document) if isinstance(document, str) and len(ids) else 0
            if read > LOOKED_THROUGH and len(found) >= samples:
                break
        return found

    def _whole(self, document: str | Tensor) -> Tensor:
        if isinstance(document, Tensor):
            return document
        # A token is at least one byte, so a short text need not be encoded; special tokens are few.
        if len(document.encode()) + 8 < self.length:
            return torch.empty(0, dtype=torch.long)
        return self.encode(document)

    def _piece(self, text: LongText) -> Tensor:
        size = min(text.size, max(PIECE, _BYTES_A_TOKEN * self.length))
        return self.encode(text.at(self.random.randint(0, text.size - size), size), special=False)


def disjoint_windows(documents: Documents, encode: Encode, length: int, limit: int | None = None) -> Tensor:
    """All whole windows of ``length`` tokens of the documents joined by a blank line, [windows, length] int32.

    Texts of together at most ``WHOLE`` bytes are tokenised at once; more text in pieces that are cut between
    words, where tokenizers begin anew. With a ``limit`` no more is read than its windows need. Where text and token ids
    are mixed, the text between two lists of ids is joined.

    Raises:
        CalibrationError: fewer tokens than one window; the message has the counts. An id that is no id.
    """
    need = None if limit is None else length * limit
    tokens = array("i")
    report(Progress("tokenizing", 0, limit, documents.label))
    for ids in _in_order(documents.documents, encode, need):
        ids = ids.long()
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 31):
            raise CalibrationError(
                f"data '{documents.label}'",
                found=f"token ids from {int(ids.min())} to {int(ids.max())}",
                do="Ids are those of a tokenizer, from 0 on",
            )
        tokens.frombytes(ids.to(torch.int32).numpy().tobytes())
        report(Progress("tokenizing", len(tokens) // length, limit, documents.label))
        if need is not None and len(tokens) >= need:
            break
    count = len(tokens) // length
    if count == 0:
        raise _too_few(documents, f"{len(tokens)} tokens in all", 1, length)
    return torch.frombuffer(tokens, dtype=torch.int32)[: count * length].view(count, length)[:limit]


def _in_order(documents: Iterable[Document], encode: Encode, need: int | None) -> Iterator[Tensor]:
    for is_ids, run in groupby(documents, lambda document: isinstance(document, Tensor)):
        if is_ids:
            yield from (some for document in run if isinstance(document, Tensor) for some in document.split(WHOLE))
        else:
            yield from _text_ids((document for document in run if not isinstance(document, Tensor)), encode, need)


def _text_ids(texts: Iterator[str | LongText], encode: Encode, need: int | None) -> Iterator[Tensor]:
    """The ids of ``texts`` joined, or of so many of them as give ``need``."""
    held: list[str | LongText] = []
    size = counted = 0
    for text in texts:
        held.append(text)
        size += len(_BETWEEN) + (text.size if isinstance(text, LongText) else len(text.encode()))
        if size > WHOLE + len(_BETWEEN):
            yield from _ids_of_pieces(pieces(joined(chain(held, texts), _BETWEEN)), encode)
            return
        if need is not None and isinstance(text, str):
            counted += len(encode(text))
            if counted >= need:
                break
    yield encode(_BETWEEN.join(text for text in held if isinstance(text, str)))


def _ids_of_pieces(texts: Iterator[str], encode: Encode) -> Iterator[Tensor]:
    """The ids of all pieces together: what a sequence begins and ends with stands once."""
    head, tail = _around(encode)
    # Some tokenizers put a space before whatever begins a text: let it begin with the end of a line, unless that is to
    # them a space as well.
    mark = encode("\n", special=False)
    if torch.equal(mark, encode(" ", special=False)):
        mark = mark[:0]
    yield head
    for number, text in enumerate(texts):
        ids = encode("\n" + text, special=False) if number and len(mark) else encode(text, special=False)
        if number and len(mark):
            ids = ids[len(mark) :] if torch.equal(ids[: len(mark)], mark) else encode(text, special=False)
        yield ids
    yield tail


def _around(encode: Encode) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts before and behind a text."""
    with_them, plain = encode("a"), encode("a", special=False)
    begin = next(
        (i for i in range(len(with_them) - len(plain) + 1) if torch.equal(with_them[i : i + len(plain)], plain)), 0
    )
    return with_them[:begin], with_them[begin + len(plain) :]


def _count(document: Document) -> int:
    return len(document) if isinstance(document, Tensor) else -1


def _too_few(documents: Documents, found: str, samples: int, length: int) -> CalibrationError:
    return CalibrationError(
        f"{samples} samples of {length} tokens from {documents.label}",
        found=found,
        do="Give longer text, or lower --sequence-length or --samples",
    )
