"""Single files that a user asked for: reports, recipes, graphs, pictures."""

from __future__ import annotations

import os
from pathlib import Path

from sparsify.durable import make_folders, write_whole
from sparsify.errors import BackendError
from sparsify.files.reading import kind_at

# How far into a file its mark is looked for.
_HEAD = 2048


def check_file(path: Path, what: str, ours: tuple[str, ...], made_by: str, *, overwrite: bool, option: str) -> None:
    """Raise unless ``path`` may be written: nothing is there, or a file of the same kind that is to be replaced.

    Args:
        what: it is: ``page``, ``recipe``. ours: one of these stands near the beginning of every file of that kind.
        made_by: the command that writes such files. option: which names another place.

    Raises:
        BackendError: a folder, a link, somebody's file, or an older one without ``overwrite``.
    """
    asked = f"{what} {path}"
    if not os.path.lexists(path):
        return
    if kind_at(path) == "folder":
        raise BackendError(asked, found="a folder", do=f"Name a file in it with {option}")
    if kind_at(path) != "file" or path.is_symlink():
        found = "a link" if path.is_symlink() else "something that is no regular file"
        raise BackendError(asked, found=found, do=f"Choose another name with {option}")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not any(mark.encode() in head for mark in ours):
        found = f"a file that {made_by} did not write"
        raise BackendError(f"replacing {path}", found=found, do=f"Delete it yourself, or choose another {option}")
    if not overwrite:
        do = f"Pass --overwrite to replace it, or choose another {option}"
        raise BackendError(asked, found="it exists already", do=do)


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
