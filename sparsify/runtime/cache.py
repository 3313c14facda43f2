"""The user's cache folder: compiled kernels and what they were timed to take."""

from __future__ import annotations

import os
from pathlib import Path

from sparsify.durable import make_folders, write_whole


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$SPARSIFY_CACHE``, or ``sparsify`` in the user's cache folder."""
    own = os.environ.get("SPARSIFY_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsify"


def put_whole(path: Path, content: bytes) -> None:
    """Write a file of the cache at once: of two processes that get here together each renames a whole one.

    A folder that cannot be written costs the work once more the next time, and nothing else.
    """
    try:
        make_folders(path.parent, 0o700)
        write_whole(path, content, mode=0o600)
    except OSError:
        return
