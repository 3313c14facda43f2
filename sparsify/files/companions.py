"""What lies beside the weights in a model folder: tokenizer, configs, code, licence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files.ledger import Ledger
from sparsify.files.manifest import MANIFEST, write_json
from sparsify.files.reading import MAX_INDEX, admit, read_json

# Files that hold weights, of any framework. They are written anew or left behind: copied they would still be dense.
WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".data"}
)
# What models and tokenizers are loaded from, and fetched from the hub; who loads goes on without some of it.
_LOADED = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".py"})


def holds_weights(name: str) -> bool:
    """Whether a file of that name holds weights or says where they are, an adapter's among them."""
    return Path(name).suffix.lower() in WEIGHT_SUFFIXES or name.endswith(".index.json") or name == "adapter_config.json"


def companions(folder: Path) -> Iterator[Path]:
    """The files of ``folder`` that an output carries along: no weights, no index of weights, no manifest.

    Raises:
        CheckpointError: one that is no regular file of the folder; see :func:`sparsify.files.reading.admit`.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise CheckpointError(
            f"model folder {folder}", found=found, do="Name a folder that sparsify or Hugging Face wrote"
        )
    for path in folder.iterdir():
        weights = holds_weights(path.name) and path.name != "adapter_config.json"
        if not weights and path.name != MANIFEST and not path.name.startswith(".") and not path.is_dir():
            yield admit(path)


def check_companions(folder: Path, ledger: Ledger) -> None:
    """Look at everything that lies beside the weights before any of it is read, by us or by transformers.

    Raises:
        CheckpointError: a file that is not what was written, one that is missing, weights that were added, JSON out of
            bounds, or no regular file of the folder.
    """
    if ledger.complete and folder.is_dir():
        _check_names(folder, ledger)
    for path in companions(folder):
        size = path.stat().st_size
        if path.suffix == ".json" and size > MAX_INDEX:
            raise CheckpointError(f"{path}", found=f"{size} bytes, more than {MAX_INDEX}", do="Fetch the folder again")
        ledger.check_file(path)
    if (folder / "generation_config.json").is_file():
        # transformers goes on without one that it cannot read.
        read_json(folder / "generation_config.json")


def _check_names(folder: Path, ledger: Ledger) -> None:
    here = {path.name for path in folder.iterdir()}
    known = ledger.headers.keys() | ledger.files.keys()
    # Read by nobody, or by transformers in place of ours.
    if added := sorted(name for name in here - known if holds_weights(name) and not name.startswith(".")):
        raise ledger.unlike(f"{added[0]} of {folder}", f"{MANIFEST} does not know it")
    gone = sorted(name for name in known - here if Path(name).suffix.lower() in _LOADED)
    if gone:
        raise ledger.unlike(f"{gone[0]} of {folder}", f"{MANIFEST} names it, and it is not there")


def copy_companions(folder: Path, into: Path) -> None:
    """Copy the companions of ``folder``'s weights into the folder ``into``."""
    for path in companions(folder):
        shutil.copyfile(path, into / path.name)


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the content of ``folder``'s config.json by what ``change`` makes of it."""
    path = folder / "config.json"
    before = read_json(path)
    after = change(before)
    if after is not before:
        write_json(path, after)
