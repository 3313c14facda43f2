"""The last bytes of a file of machine code are a digest of those before: it is whole, or it is not run.

Appended, not beside it: two processes that replace one file at once never make a pair that does not fit. What loads
libraries does not look at it. Imports nothing of ours, so that the package's build can load it by its path.
"""

from __future__ import annotations

import hashlib

_MARK = b"sparsify seal 1\n"
_DIGEST = 32


def sealed(content: bytes) -> bytes:
    return content + _MARK + _digest(content)


def unsealed(content: bytes) -> bytes | None:
    """What :func:`sealed` was given; None where these are not the bytes that it made."""
    cut = len(content) - len(_MARK) - _DIGEST
    inner = content[: max(cut, 0)]
    return inner if cut > 0 and content[cut:] == _MARK + _digest(inner) else None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST, person=b"sparsify-code").digest()
