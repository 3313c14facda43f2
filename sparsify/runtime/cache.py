"""The user's cache folder: compiled kernels and what they were timed to take."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$SPARSIFY_CACHE``, or ``sparsify`` in the user's cache folder."""
    own = os.environ.get("SPARSIFY_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsify"


def put_whole(path: Path, content: bytes) -> None:
    """Write a file of the cache at once: of two processes that get here together each renames a whole one.

    A folder that cannot be written costs the work once more the next time, and nothing else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:
        return
