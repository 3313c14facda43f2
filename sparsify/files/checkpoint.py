"""A folder of safetensors as a store of named tensors, read lazily and patched in place.

Nothing is held: a tensor is read from its file when asked for. A pruned tensor has the shape and dtype of the dense
one, so an output folder begins as a copy of the source's shards and each pruned tensor overwrites its own bytes:
names, order, sharding and every other tensor stay as they were, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.tensors import checksum, checksum_of_span, read_into, write_from

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# Names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: torch.dtype
    shape: torch.Size
    start: int
    size: int


class Checkpoint:
    """The safetensors of a model folder, one file or sharded.

    Raises:
        CheckpointError: the folder or a file is missing, an index points outside the folder or disagrees with its
            shards, or a file is truncated, overlapping or otherwise no safetensors.
    """

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        self.folder = folder
        self.writable = writable
        self.files = _weight_files(folder)
        self._entries: dict[str, _Entry] = {}
        # Checksums of what was written, for whoever reads it back.
        self.written: dict[str, int] = {}
        for path, listed in self.files.items():
            entries = _read_header(path)
            if listed is not None and (missing := sorted(listed - entries.keys())):
                raise CheckpointError(
                    f"tensor {missing[0]}",
                    found=f"{INDEX} places it in {path.name}, which does not hold it",
                    do="The index and the shards are of different models: fetch the folder again",
                )
            for name, entry in entries.items():
                if name in self._entries:
                    raise CheckpointError(
                        f"tensor {name}",
                        found=f"in both {self._entries[name].path.name} and {path.name}",
                        do="Remove the shard that does not belong to this model",
                    )
                self._entries[name] = entry

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> torch.Size:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def nbytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(path.stat().st_size for path in self.files)

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``, freshly read into memory of its own."""
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with entry.path.open("rb", buffering=0) as file:
            try:
                read_into(file.fileno(), tensor, entry.start)
            except EOFError as error:
                raise CheckpointError(
                    f"reading {name}",
                    found=f"{entry.path.name} ended early ({error})",
                    do="Something truncated it while it was read: fetch it again",
                ) from error
        return tensor

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite the bytes of ``name`` in its file; shape and dtype must be those it has."""
        entry = self._entries[name]
        if not self.writable:
            raise CheckpointError(f"writing {name}", found=f"{self.folder} is a source", do="Write to an output")
        if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
            raise CheckpointError(
                f"writing {name}",
                found=f"{tuple(tensor.shape)} {tensor.dtype} for {tuple(entry.shape)} {entry.dtype}",
                do="A pass may not change a tensor's shape or dtype",
            )
        tensor = tensor.detach().cpu().contiguous()
        with entry.path.open("r+b", buffering=0) as file:
            write_from(file.fileno(), tensor, entry.start)
        self.written[name] = checksum(tensor)

    def checksum(self, name: str) -> int:
        """CRC-32 of the bytes of ``name``, read in pieces.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        entry = self._entries[name]
        try:
            return checksum_of_span(entry.path, entry.start, entry.size)
        except EOFError as error:
            raise CheckpointError(
                f"reading {name}", found=f"{entry.path.name} ended early ({error})", do="Fetch it again"
            ) from error

    def span(self, name: str) -> tuple[Path, int, int]:
        """Where the bytes of ``name`` lie: file, offset, length."""
        entry = self._entries[name]
        return entry.path, entry.start, entry.size


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files of ``folder``, each with the tensors that the index lists for it (None without an index)."""
    if not folder.exists():
        raise CheckpointError(f"model folder {folder}", found="no such folder", do="Check the path")
    if not folder.is_dir():
        raise CheckpointError(f"model folder {folder}", found="a file", do="Name the folder that holds config.json")
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).exists():
        if (folder / PICKLED).exists() or (folder / PICKLED_INDEX).exists():
            raise CheckpointError(
                f"weights of {folder}",
                found=f"only {PICKLED}, a pickle, which can run code when it is read",
                do="Pass --allow-bin to read it with torch's weights_only loader, or convert it to safetensors",
            )
        raise CheckpointError(
            f"weights of {folder}",
            found=f"neither {WEIGHTS} nor {INDEX}",
            do="Its weights are in the ONNX files: sparsify expand makes safetensors of packed ones"
            if any(folder.glob("*.onnx"))
            else "Is this a Hugging Face model folder?",
        )
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError("weight_map is not a table of names")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{INDEX} of {folder}", found=f"not a weight index ({error})", do="Fetch the folder again"
        ) from error
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{INDEX} of {folder}",
                found=f"{name} is placed in '{file}', outside the folder",
                do="Do not trust this folder; a shard must lie beside its index",
            )
        if not (folder / file).is_file():
            raise CheckpointError(f"shard {file} of {folder}", found="no such file", do="Fetch the folder again")
        files.setdefault(folder / file, set()).add(name)
    return dict(files)


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        # The library checks lengths, offsets, overlaps and dtypes; the offsets themselves it does not show.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"weights file {path}", found=f"not a sound safetensors file ({error})", do="Fetch it again"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in DTYPES:
            raise CheckpointError(
                f"tensor {name} in {path.name}",
                found=f"dtype {info['dtype']}, which has no torch equivalent here",
                do=f"Known dtypes: {', '.join(DTYPES)}",
            )
        begin, end = info["data_offsets"]
        entries[name] = _Entry(path, DTYPES[info["dtype"]], torch.Size(info["shape"]), 8 + length + begin, end - begin)
    return entries
