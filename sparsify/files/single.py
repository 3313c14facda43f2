"""Single files that a user asked for: reports and pictures."""

from __future__ import annotations

from pathlib import Path

from sparsify.durable import make_folders, write_whole
from sparsify.errors import BackendError


def put_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, in the place of an older file: at every moment one of them is there, whole.

    Raises:
        BackendError: it cannot be written; an older one stays.
    """
    try:
        make_folders(path.absolute().parent)
        write_whole(path.absolute(), content)
    except OSError as error:
        raise BackendError(
            f"writing {path}", found=f"it failed ({error})", do="Choose another place; an older file is as it was"
        ) from error
