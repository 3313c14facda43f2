"""``sparsify.json`` as an author would write it who lies, not as a disk would damage it: its digests fit."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.files.checkpoint import Checkpoint
from sparsify.files.ledger import write_manifest
from sparsify.files.manifest import MANIFEST, digest_of_manifest, read_manifest
from sparsify.tensors import as_bytes


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and the digest that it holds of itself."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if "digests" in manifest:
        manifest["digests"]["manifest"] = digest_of_manifest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def reseal(folder: Path) -> None:
    """Take what lies in a folder of safetensors for what was written."""
    write_manifest(folder, read_manifest(folder), Checkpoint(folder).digests())


def as_format_1(folder: Path) -> None:
    """The manifest that sparsify 0.1 wrote: CRC-32 of tensors, and nothing of other files."""
    manifest = read_manifest(folder)
    del manifest["digests"], manifest["source_check"]
    files = Checkpoint(folder)
    sums = {name: zlib.crc32(as_bytes(files.read(name))) for name in files.names()}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 1, "checksums": sums}))
