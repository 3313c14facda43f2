"""What of a model folder is opened at all: regular files that belong to it, and JSON within bounds."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, Literal

from sparsify.errors import CheckpointError
from sparsify.files.json_text import parse_json

# Bytes of a config.json; of an index of shards (that of the largest models has 10 MB); of a sparsify.json, which lists
# every channel that was taken out.
MAX_CONFIG, MAX_INDEX, MAX_MANIFEST = 16 << 20, 128 << 20, 256 << 20

# Files without which a model is not what its publisher made; what else lies there (pictures) is carried as it is.
_NEEDED = frozenset({".safetensors", ".bin", ".gguf", ".onnx", ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"})
# Files that hold weights.
_WEIGHTS = (".safetensors", ".onnx", ".data", ".bin")
# A pointer of Git LFS begins so, and is no longer than this.
_POINTER, _LONGEST_POINTER = b"version https://git-lfs", 1024

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def admit(path: Path) -> Path:
    """``path`` itself, if it is a regular file of its folder.

    A link is followed inside the folder, and from a snapshot of a Hugging Face hub cache into that cache's blobs.

    Raises:
        CheckpointError: a link to elsewhere or to nothing, or no regular file: reading one may never end; or what Git
            leaves in the place of a large file.
    """
    asked = f"file {path}"
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            asked,
            found=f"a link to {path.readlink()}, where nothing is",
            do="Remove the link if the model does not need the file; else fetch the folder again",
        )
    try:
        if path.is_symlink() and not _belongs(path.parent.resolve(), target := path.resolve(strict=True)):
            raise CheckpointError(
                asked,
                found=f"a link to {target}, outside the model's folder",
                do="Copy the file itself into the folder; links are followed only inside a Hugging Face hub cache",
            )
        there = path.stat()
        kind = stat.S_IFMT(there.st_mode)
    except (OSError, RuntimeError) as error:  # (RuntimeError: a circle of links, before Python 3.13)
        raise CheckpointError(asked, found=f"it cannot be opened ({error})", do="Fetch the folder again") from error
    if kind != stat.S_IFREG:
        found = f"{_KINDS.get(kind, 'something else')}, and only regular files are read"
        raise CheckpointError(asked, found=found, do="Do not trust this folder; remove it or fetch it again")
    if there.st_size <= _LONGEST_POINTER and path.suffix.lower() in _NEEDED and _is_pointer(path):
        raise CheckpointError(
            asked,
            found="a Git LFS pointer, which says where the file is, and not the file",
            do="Run `git lfs pull` in that folder, or fetch it with `hf download`",
        )
    return path


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:  # (whoever reads it says so)
        return False


def _belongs(folder: Path, target: Path) -> bool:
    """Whether ``target`` lies in ``folder``, or in the blobs of the hub cache whose snapshot ``folder`` is (in)."""
    if folder in target.parents:
        return True
    snapshot = next((p for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    if snapshot is None:
        return False
    repository = snapshot.parent.parent
    return repository.name.startswith("models--") and target.parent == repository / "blobs"


def read_json(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """The table that a JSON file holds.

    Args:
        most: bytes that it may have.

    Raises:
        CheckpointError: no regular file, larger or deeper than the bounds above, no JSON, or no table.
    """
    size = admit(path).stat().st_size
    if size > most:
        raise CheckpointError(f"{path}", found=f"{size} bytes, more than {most}", do="Is it what its name says?")
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}", found=f"not JSON ({error})", do="Fetch or make the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}", found="JSON that is no table", do="Fetch or make the folder again")
    return content


def kind_at(path: str | Path) -> Literal["file", "folder", "other"] | None:
    """What lies at ``path``, links followed; None: nothing, or nothing that can be looked at.

    A name that no system takes (300 bytes long, a NUL in it, another user's home) is a name of nothing.
    """
    try:
        mode = Path(path).expanduser().stat().st_mode
    except (OSError, ValueError, RuntimeError):
        return None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def weight_bytes(folder: Path) -> int:
    """Bytes of the files in ``folder`` that hold weights, graphs among them."""
    files = (file for file in folder.iterdir() if file.suffix in _WEIGHTS and kind_at(file) == "file")
    return sum(file.stat().st_size for file in files)
