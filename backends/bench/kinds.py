"""What kind of model a folder holds, which says what opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sparsify.backends.packed.config import sites_of
from sparsify.errors import CheckpointError
from sparsify.files.manifest import read_manifest
from sparsify.files.reading import kind_at, read_json

FolderKind = Literal["packed", "checkpoint", "ragged", "ONNX"]


def folder_kind(folder: str | Path) -> FolderKind:
    """By what lies there.

    Raises:
        CheckpointError: nothing there, a folder without a model in it, or a damaged ``config.json`` or
            ``sparsify.json``.
    """
    place = Path(folder)
    at = kind_at(place)
    if place.suffix == ".onnx" and at == "file":
        return "ONNX"
    if at != "folder":
        found = "no such folder" if at is None else "a file"
        raise CheckpointError(f"bench {folder}", found=found, do="Name a folder, or an ONNX file")
    if any(place.glob("*.onnx")):
        return "ONNX"
    if kind_at(place / "config.json") != "file":
        found = "no config.json there, and no ONNX file"
        raise CheckpointError(f"bench {folder}", found=found, do="Name a model's folder, or one that compile wrote")
    if sites_of(read_json(place / "config.json"), str(folder)) is not None:
        return "packed"
    structure = read_manifest(place).get("structure", ())
    return "ragged" if any(record.get("ragged") for record in structure) else "checkpoint"
