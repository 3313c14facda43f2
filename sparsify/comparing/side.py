"""One of two models that are compared: its tensors, read one at a time, and what its folder says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files.checkpoint import INDEX, WEIGHTS
from sparsify.files.ledger import Ledger
from sparsify.files.reading import kind_at, read_json
from sparsify.frontend.source import open_source
from sparsify.frontend.stores import find_folder, open_store, pickles, read_pickles
from sparsify.ir.store import TensorStore
from sparsify.method.registry import loaded

_DO = "Name folders of safetensors (packed and ragged ones too), GGUF files, or ONNX folders"


@dataclass(frozen=True)
class Side:
    """A model.

    Attributes:
        name: as the user wrote it. path: where it lies. store: its tensors, dense.
        manifest, config: of its folder; empty where there is none. files: names of what lies in it.
    """

    name: str
    path: Path
    store: TensorStore
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    files: frozenset[str]


def open_side(model: str | Path, *, check: bool = True, allow_bin: bool = False) -> Side:
    """What ``model`` names: a folder, a hub id, a GGUF file, an ONNX file or folder.

    Args:
        check: hold every byte that is read against the folder's ``sparsify.json``.
        allow_bin: read pytorch_model.bin where there are no safetensors.

    Raises:
        CheckpointError: nothing there, nothing whose tensors can be read, or a damaged folder.
    """
    path = find_folder(model)
    folder = path if kind_at(path) == "folder" else path.parent
    ledger = Ledger.of(folder, check) if folder == path or path.suffix.lower() == ".onnx" else Ledger()
    config = read_json(path / "config.json") if kind_at(path / "config.json") == "file" else {}
    files = frozenset(file.name for file in folder.iterdir()) if folder == path else frozenset({path.name})
    return Side(str(model), path, _store(path, ledger, allow_bin), ledger.manifest, config, files)


def _store(path: Path, ledger: Ledger, allow_bin: bool) -> TensorStore:
    if kind_at(path) == "folder":
        if (path / WEIGHTS).exists() or (path / INDEX).exists():
            return open_store(path, ledger)
        if allow_bin and pickles(path):
            return read_pickles(path)
    if path.suffix.lower() == ".gguf":
        return open_source(path).weights.store
    for _, _, opened in loaded("sparsify.readers"):
        store: TensorStore | None = opened(path, ledger)
        if store is not None:
            return store
    if kind_at(path / "adapter_config.json"):
        found = "a LoRA adapter, which has no weights of the model's own"
        raise CheckpointError(f"comparing {path}", found=found, do=f"{_DO}; sparsify eval --adapter merge measures it")
    if kind_at(path) == "folder" and (kind_at(path / "config.json") or pickles(path)):
        return open_store(path, ledger)  # which says what is wrong with it
    raise CheckpointError(f"comparing {path}", found="no weights that are read here", do=_DO)
