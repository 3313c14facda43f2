"""Documents cut into sequences: random windows to calibrate on, disjoint ones to evaluate on."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.data.sources import Document, Documents
from sparsify.errors import CalibrationError

Encode = Callable[[str], Tensor]


def random_windows(documents: Documents, encode: Encode, samples: int, length: int, seed: int) -> Tensor:
    """``samples`` windows of exactly ``length`` tokens, [samples, length], as the papers draw them.

    A document is drawn, and drawn again until one has more than ``length`` tokens; then a uniform window of it
    (algorithms.md, section 1.5). Rows of a token file that have exactly ``length`` tokens are taken as they are.

    Raises:
        CalibrationError: no document is long enough; the message has the counts.
    """
    if documents.fixed and all(len(d) == length for d in documents.documents):
        rows = documents.documents[:samples]
        if len(rows) < samples:
            raise _too_few(documents, f"{len(rows)} sequences of {length} tokens", samples, length)
        return torch.stack([row for row in rows if isinstance(row, Tensor)])
    draw = random.Random(seed)
    known: dict[int, Tensor | None] = {}
    longest = 0

    def tokens(index: int) -> Tensor | None:
        nonlocal longest
        if index not in known:
            ids = _encode(documents.documents[index], encode, at_least=length)
            longest = max(longest, len(ids))
            known[index] = ids if len(ids) > length else None
        return known[index]

    windows: list[Tensor] = []
    candidates: list[int] | range = range(len(documents.documents))
    misses = 0
    while len(windows) < samples:
        ids = tokens(draw.choice(candidates))
        if ids is not None:
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
            continue
        misses += 1
        if misses == 64:
            # Long documents are rare here: look at all of them once instead of drawing for ever.
            candidates = [i for i in candidates if tokens(i) is not None]
            if not candidates:
                found = f"{len(documents.documents)} documents, the longest of {longest} tokens"
                raise _too_few(documents, found, samples, length)
    return torch.stack(windows)


def disjoint_windows(documents: Documents, encode: Encode, length: int, limit: int | None = None) -> Tensor:
    """All whole windows of ``length`` tokens of the documents joined by a blank line, [windows, length].

    Raises:
        CalibrationError: fewer tokens than one window; the message has the counts.
    """
    texts = [d for d in documents.documents if isinstance(d, str)]
    parts = [d for d in documents.documents if isinstance(d, Tensor)]
    if texts:
        if limit is not None:
            # Tokens are at most as many as bytes; read enough for the limit and not a library of text.
            texts = _enough(texts, encode, length * limit)
        parts.append(encode("\n\n".join(texts)))
    ids = torch.cat(parts)
    count = len(ids) // length
    if count == 0:
        raise _too_few(documents, f"{len(ids)} tokens in all", 1, length)
    return ids[: count * length].view(count, length)[:limit]


def _enough(texts: list[str], encode: Encode, tokens: int) -> list[str]:
    taken, total = [], 0
    for text in texts:
        if total >= tokens:
            break
        taken.append(text)
        total += len(encode(text))
    return taken


def _encode(document: Document, encode: Encode, at_least: int) -> Tensor:
    if isinstance(document, Tensor):
        return document
    # A token is at least one byte, so a short text need not be encoded; special tokens are few.
    if len(document.encode()) + 8 < at_least:
        return torch.empty(0, dtype=torch.long)
    return encode(document)


def _too_few(documents: Documents, found: str, samples: int, length: int) -> CalibrationError:
    return CalibrationError(
        f"{samples} samples of {length} tokens from {documents.label}",
        found=found,
        do="Give longer text, or lower --sequence-length or --samples",
    )
