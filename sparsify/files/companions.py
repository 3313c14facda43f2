"""What lies beside the weights in a model folder: tokenizer, configs, code, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsify.files.manifest import MANIFEST, write_json

# Files that hold weights, of any framework. They are written anew or left behind: copied they would still be dense.
WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".data"}
)


def companions(folder: Path) -> Iterator[Path]:
    """The files of ``folder`` that an output carries along: no weights, no index of weights, no manifest."""
    for path in folder.iterdir():
        weights = path.suffix.lower() in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != MANIFEST and not path.name.startswith("."):
            yield path


def copy_companions(folder: Path, into: Path) -> None:
    """Copy the companions of ``folder``'s weights into the folder ``into``."""
    for path in companions(folder):
        shutil.copyfile(path, into / path.name)


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the content of ``folder``'s config.json by what ``change`` makes of it."""
    path = folder / "config.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    after = change(before)
    if after is not before:
        write_json(path, after)
