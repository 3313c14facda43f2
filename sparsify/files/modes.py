"""Who may read an output: whoever may read its source."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sparsify.files.companions import WEIGHT_SUFFIXES

# An output is patched and replaced by its owner; nobody who merely uses the machine writes to one.
_ALWAYS, _NEVER = 0o600, 0o002


def carry_modes(like: Path | None, folder: Path, own: int) -> None:
    """Give ``folder``, and every file in it, the mode that is theirs in the folder ``like``.

    A file that ``like`` does not have may be read by those who may read all of the weights there.

    Args:
        own: the mode that the system gave ``folder``; it gets no wider.
    """
    if like is None or not like.is_dir():
        set_mode(folder, own)
        return
    files = [path for path in like.iterdir() if path.is_file()]
    weights = [path for path in files if path.suffix.lower() in WEIGHT_SUFFIXES] or files
    least = 0o664
    for path in weights:
        least &= path.stat().st_mode
    for inner, _, names in os.walk(folder):
        for name in names:
            path = Path(inner) / name
            other = like / path.relative_to(folder)
            mode = stat.S_IMODE(other.stat().st_mode) & 0o777 if other.is_file() else least
            if not path.is_symlink():
                set_mode(path, mode & ~_NEVER | _ALWAYS)
    set_mode(folder, own & (like.stat().st_mode | 0o7700))


def set_mode(path: Path, mode: int) -> None:
    """As ``chmod``; of a filesystem that has no modes nothing is asked."""
    if stat.S_IMODE(path.stat().st_mode) == mode:
        return
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EROFS):
            raise
