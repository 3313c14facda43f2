"""Where the weights of what a user names lie, and what reads them."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

import torch

from sparsify.context import Progress, report
from sparsify.errors import CheckpointError, first_line
from sparsify.files.checkpoint import INDEX, PICKLED, PICKLED_INDEX, WEIGHTS
from sparsify.files.ledger import Ledger
from sparsify.files.reading import MAX_INDEX, admit, kind_at, read_json
from sparsify.frontend.adapter import MergedStore
from sparsify.ir.store import MemoryStore, RenamedStore, TensorStore
from sparsify.method.registry import is_own, loaded, package_of, warn_of
from sparsify.quantized.recognise import open_checkpoint


def open_store(folder: Path, ledger: Ledger, to: torch.dtype | None = None) -> TensorStore:
    """What reads the tensors of ``folder``, each held against ``ledger``: a registered store that knows it, else its
    safetensors as they lie, or dense where they are quantized, in ``to`` (None: bfloat16).

    Raises:
        CheckpointError: no sound model folder.
    """
    for _, entry, opened in loaded("sparsify.stores"):
        try:
            store: TensorStore | None = opened(folder, ledger)
            if store is not None:
                store.names()
                return store
        except Exception as error:
            # Somebody's, which may do anything; where this is its kind of folder the safetensors do not fit a model.
            if is_own(entry):
                raise
            warn_of(entry, f"it fails ({type(error).__name__}: {first_line(error)}); {package_of(entry)} brings it")
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf and not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        raise CheckpointError(
            f"weights of {folder}", found=f"no safetensors, but {gguf[0]}", do=f"Name the file: {folder / gguf[0]}"
        )
    return open_checkpoint(folder, ledger, to)


def find_folder(model: str | Path) -> Path:
    """What a user names as it lies here; a hub id is fetched.

    Raises:
        CheckpointError: no such thing here, and none that the hub gives.
    """
    if kind_at(model):
        return Path(model).expanduser().absolute()
    text = str(model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        what = "file" if text.lower().endswith(".gguf") else "folder"
        raise CheckpointError(f"model {text}", found=f"no such {what}", do="Check the path")
    from huggingface_hub import snapshot_download

    report(Progress("asking the hub", what=text))
    try:
        found = snapshot_download(
            text, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "[0-9]_*/*.bin"]
        )
    except Exception as error:  # the hub raises a dozen kinds, all of which mean: it cannot be had
        raise CheckpointError(
            f"model {text}",
            found=f"nothing of that name here, and the hub did not give it ({type(error).__name__})",
            do="Check the path; for a hub id check the name, the network and your token",
        ) from error
    return Path(found)


def pickles(folder: Path) -> list[Path]:
    """The ``pytorch_model.bin`` files of ``folder``.

    Raises:
        CheckpointError: an index that is none.
    """
    if (folder / PICKLED).exists():
        return [folder / PICKLED]
    if (folder / PICKLED_INDEX).exists():
        placed = read_json(folder / PICKLED_INDEX, MAX_INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            raise CheckpointError(f"{folder / PICKLED_INDEX}", found="no weight_map in it", do="Fetch the folder again")
        return [folder / Path(name).name for name in sorted(set(placed.values()))]
    return []


def read_pickles(folder: Path) -> MemoryStore:
    """Their tensors, read by torch's ``weights_only`` loader.

    Raises:
        CheckpointError: it refuses them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in pickles(folder):
        try:
            state = torch.load(admit(path), map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError:
            raise
        except Exception as error:  # unpickling refuses in many ways, all of them final
            raise CheckpointError(
                f"weights file {path}",
                found=f"torch's weights_only loader refuses it ({first_line(error)})",
                do="Do not load it; ask the author for safetensors",
            ) from error
        tensors |= {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return MemoryStore(None, tensors)


def read_for(store: TensorStore) -> Container[str]:
    """The names of the weight files that a store reads."""
    if isinstance(store, (MergedStore, RenamedStore)):
        return read_for(store.base)
    files = getattr(getattr(store, "checkpoint", store), "files", None)
    if files is not None:
        return {INDEX, *(path.name for path in files)}
    return {PICKLED, PICKLED_INDEX} if isinstance(store, MemoryStore) else set()
