"""``sparsify.json``: its name, its version, reading and writing it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files.manifest_form import misfit
from sparsify.files.reading import MAX_MANIFEST, read_json

# 1: CRC-32 of tensors under "checksums". 2: "digests", see docs/format.md.
FORMAT = 2
MANIFEST = "sparsify.json"
# What its digests are of.
PARTS = ("tensors", "headers", "files")
AS_WRITTEN = (
    "Fetch or make the folder again; if it was changed on purpose, commands that have --no-check (in Python: "
    "check=False) take it as it is"
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """``sparsify.json`` of ``folder`` as it lies there; empty where there is none. What is read by it should be held
    against it: :class:`sparsify.files.ledger.Ledger`.

    Raises:
        CheckpointError: it is no JSON, not a regular file, out of bounds, or not of a manifest's form.
    """
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        return {}
    content = read_json(path, MAX_MANIFEST)
    if (found := misfit(content)) is not None:
        raise CheckpointError(
            str(path), found=found, do="Fetch the folder or compile again; without it the folder is an ordinary one"
        )
    return content


def sealed_manifest(folder: Path) -> dict[str, Any]:
    """The same, held against the digest that it has of itself (from format 2 on).

    Raises:
        CheckpointError: as above; another program's file, one of a newer format, or not what was written.
    """
    manifest = read_manifest(folder)
    if not manifest and not (folder / MANIFEST).exists():
        return {}
    # Without a number it is another program's, or another file put in its place.
    version = manifest.get("format", -1)
    if type(version) is not int or version < 1:
        found = f"format {version!r}" if "format" in manifest else "nothing of what sparsify writes there"
        raise damaged(folder, found)
    if version > FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}",
            found=f"format {version}; this sparsify reads up to {FORMAT}",
            do="Install a newer sparsify (pip install -U sparsify-fx)",
        )
    if "digests" in manifest:
        digests = manifest["digests"]
        parts = [digests.get(kind) for kind in PARTS] if isinstance(digests, Mapping) else [None]
        if not all(isinstance(part, Mapping) and all(isinstance(v, str) for v in part.values()) for part in parts):
            raise damaged(folder, "digests that are none")
        if digests.get("manifest") != digest_of_manifest(manifest):
            raise damaged(folder, "its content is not what was written (its digest of itself differs)")
    elif version >= 2:
        raise damaged(folder, "no digests in it")
    return manifest


def damaged(folder: Path, found: str) -> CheckpointError:
    """What is raised where the manifest of ``folder`` is not one that was written."""
    return CheckpointError(f"{folder / MANIFEST}", found=found, do=AS_WRITTEN)


def section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table in the manifest; an empty one where there is none of that name.

    Raises:
        CheckpointError: something else is there.
    """
    found = manifest.get(name, {})
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{name} in {MANIFEST}", found=f"{type(found).__name__}, no table", do="Compile again")
    return found


def digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """The digest of a manifest's content, without the one that it holds of itself: of JSON with sorted keys, no
    spaces, and characters as they are."""
    digests = {k: v for k, v in manifest.get("digests", {}).items() if k != "manifest"}
    text = json.dumps({**manifest, "digests": digests}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """As transformers and people write it: indented, every language as it is."""
    path.write_bytes(to_json(content))


def to_json(content: Any) -> bytes:
    """The same, as bytes."""
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half of a pair, which JSON can spell and UTF-8 cannot
        text = json.dumps(content, indent=2).encode("ascii")
    return text + b"\n"
