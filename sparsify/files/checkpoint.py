"""A folder of safetensors as a store of named tensors, read lazily and patched in place.

Nothing is held: a tensor is read from its file when asked for. A pruned tensor has the shape and dtype of the dense
one, so an output folder begins as a copy of the source's shards and each pruned tensor overwrites its own bytes:
names, order, sharding and every other tensor stay as they were, to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.context import Progress, counted, report
from sparsify.errors import CheckpointError
from sparsify.files.ledger import Ledger
from sparsify.files.reading import MAX_INDEX, admit, kind_at, read_json
from sparsify.finite import Scan, infinities_allowed
from sparsify.tensors import BLAKE, copy_span, digest, digest_of_span, new_hash, read_into, show_span, write_from

# Bytes of a safetensors header (the library's own limit), and tensors in it; the largest models have 10^5.
MAX_HEADER, MAX_TENSORS = 100_000_000, 1 << 20
# Hashing takes a core and lets the interpreter go: past this many the disk is what takes time.
_HASHING_AT_ONCE = 8

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

    Args:
        ledger: what headers are held against now, and each tensor when it is first read; None: nothing.

    Raises:
        CheckpointError: the folder or a file is missing, an index points outside the folder or disagrees with its
            shards, or a file is truncated, overlapping or otherwise no safetensors, or not what the ledger says.
    """

    def __init__(self, folder: Path, *, writable: bool = False, ledger: Ledger | None = None) -> None:
        self.folder = folder
        self.writable = writable
        self.ledger = ledger or Ledger()
        self.files = _weight_files(folder, self.ledger)
        self._entries: dict[str, _Entry] = {}
        # Digests of what was written or copied here, for whoever reads it back.
        self.written: dict[str, str] = {}
        self.copied: dict[str, str] = {}
        # Those of every tensor of a folder that is only read, where it was copied.
        self._own: dict[str, str] = {}
        self._sound: set[str] = set()
        read = {path: _read_header(path) for path in self.files}
        held = {name for entries, _ in read.values() for name in entries}
        for path, listed in self.files.items():
            entries, header = read[path]
            self.ledger.check_header(path.name, header, held)
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
        """Return the tensor ``name``, freshly read into memory of its own.

        Raises:
            CheckpointError: it is not what the ledger says, not finite where it has to be, or its file was cut short.
        """
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
        if name not in self._sound:
            self.ledger.check_tensor(name, tensor)
            self._sound.add(name)
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
        self.written[name] = digest(tensor)

    def digest(self, name: str, algorithm: str = BLAKE) -> str:
        """The digest of the bytes of ``name`` as they lie in the file, read in pieces.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        entry = self._entries[name]
        try:
            return digest_of_span(entry.path, entry.start, entry.size, algorithm)
        except EOFError as error:
            raise CheckpointError(
                f"reading {name}", found=f"{entry.path.name} ended early ({error})", do="Fetch it again"
            ) from error

    def scans(self) -> dict[str, Scan]:
        """What is not finite in each tensor whose dtype has NaN, read in pieces, several cores at once.

        Raises:
            CheckpointError: a file ends before a tensor does.
        """

        def look(name: str) -> Scan:
            entry = self._entries[name]
            found = Scan(entry.dtype, infinities_allowed(name))
            try:
                show_span(entry.path, entry.start, entry.size, found)
            except EOFError as error:
                raise CheckpointError(
                    f"reading {name}", found=f"{entry.path.name} ended early ({error})", do="Fetch it again"
                ) from error
            return found

        wanted = [name for name, entry in self._entries.items() if Scan.reads(entry.dtype)]
        with ThreadPoolExecutor(min(_HASHING_AT_ONCE, os.cpu_count() or 1)) as pool:
            return dict(zip(counted("checking", wanted), pool.map(look, wanted), strict=True))

    def digests(self, names: Iterable[str] | None = None, algorithm: str = BLAKE) -> dict[str, str]:
        """:meth:`digest` of ``names`` (None: all), several cores at once."""
        wanted = list(self.names() if names is None else names)
        with ThreadPoolExecutor(min(_HASHING_AT_ONCE, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda name: self.digest(name, algorithm), wanted)
            return dict(zip(counted("checking", wanted), found, strict=True))

    def own_digests(self) -> dict[str, str]:
        """The digest of every tensor of a folder that is only read; not read again where it was copied."""
        return self._own or self.digests()

    def check(self) -> None:
        """Hold every tensor against the ledger.

        Raises:
            CheckpointError: one is not what was written.
        """
        wanted = [name for name in self.names() if name not in self._sound and self.ledger.wants(name)]
        for name, found in self.digests(wanted, self.ledger.algorithm).items():
            self.ledger.compare("tensor", self.ledger.tensors, name, found)
            self._sound.add(name)

    def copy_to(self, folder: Path) -> Checkpoint:
        """Copy the weight files (and their index) into ``folder``, hashed on the way, and open them for patching.

        Raises:
            CheckpointError: a tensor is not what the ledger says, or not finite where it has to be.
        """
        copied: dict[str, str] = {}
        for path in self.files:
            held = sorted((e.start, name) for name, e in self._entries.items() if e.path == path)
            begin = held[0][0] if held else path.stat().st_size
            with path.open("rb", buffering=0) as source, (folder / path.name).open("wb", buffering=0) as target:
                try:
                    copy_span(source, target, begin)
                except EOFError as error:
                    raise CheckpointError(
                        f"copying {path}", found=f"it ended early ({error})", do="Fetch it again"
                    ) from error
                for _, name in held:
                    report(Progress("copying", len(copied), len(self._entries), name))
                    entry = self._entries[name]
                    hashes = {kind: new_hash(kind) for kind in {BLAKE, self.ledger.algorithm}}
                    scan = self.ledger.scan(name, entry.dtype)
                    try:
                        copy_span(source, target, entry.size, [*hashes.values(), *([] if scan is None else [scan])])
                    except EOFError as error:
                        raise CheckpointError(
                            f"copying {name}", found=f"{path.name} ended early ({error})", do="Fetch it again"
                        ) from error
                    copied[name] = hashes[BLAKE].hexdigest()
                    if self.ledger.wants(name):
                        found = hashes[self.ledger.algorithm].hexdigest()
                        self.ledger.compare("tensor", self.ledger.tensors, name, found)
                    self.ledger.check_scan(name, scan, entry.shape)
        if list(self.files) != [self.folder / WEIGHTS]:
            shutil.copyfile(admit(self.folder / INDEX), folder / INDEX)
        result = Checkpoint(folder, writable=True)
        result.copied = copied
        self._own = dict(copied)
        return result

    def span(self, name: str) -> tuple[Path, int, int]:
        """Where the bytes of ``name`` lie: file, offset, length."""
        entry = self._entries[name]
        return entry.path, entry.start, entry.size


def _elsewhere(folder: Path) -> str:
    """What to do with a folder that holds no weights itself."""
    if any(folder.glob("*.onnx")):
        return "Its weights are in the ONNX files: sparsify expand makes safetensors of packed ones"
    inner = sorted(p.parent for name in (WEIGHTS, INDEX) for p in folder.glob(f"*/{name}"))
    if inner:
        return f"There are some in {inner[0].name}/: is {inner[0]} the model?"
    return "Is this a Hugging Face model folder?"


def _weight_files(folder: Path, ledger: Ledger) -> dict[Path, set[str] | None]:
    """Weight files of ``folder``, each with the tensors that the index lists for it (None without an index)."""
    if kind_at(folder) is None:
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
            do=_elsewhere(folder),
        )
    content: dict[str, Any] = read_json(folder / INDEX, MAX_INDEX)
    ledger.check_file(folder / INDEX)
    try:
        weight_map = content["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError("weight_map is not a table of names")
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{INDEX} of {folder}", found=f"not a weight index ({error})", do="Fetch the folder again"
        ) from error
    held: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        held.setdefault(file, set()).add(name)
    for file, names in held.items():
        if Path(file).name != file or file in ("", ".", "..") or "\0" in file:
            raise CheckpointError(
                f"{INDEX} of {folder}",
                found=f"{min(names)} is placed in '{file}', outside the folder",
                do="Do not trust this folder; a shard must lie beside its index",
            )
        if kind_at(folder / file) != "file":
            raise CheckpointError(f"shard {file} of {folder}", found="no such file", do="Fetch the folder again")
    return {folder / file: names for file, names in held.items()}


def _read_header(path: Path) -> tuple[dict[str, _Entry], str]:
    """The tensors that a file says it holds, and the digest of what says so."""
    admit(path)
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if length > MAX_HEADER:
            raise _unsound(path, f"a header of {length} bytes, more than {MAX_HEADER}")
        text = file.read(length)
    try:
        # The library checks lengths, offsets, overlaps and dtypes; the offsets themselves it does not show.
        with safe_open(path, framework="pt"):
            pass
        header = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _unsound(path, str(error)) from error
    if len(header) > MAX_TENSORS:
        raise _unsound(path, f"{len(header)} tensors, more than {MAX_TENSORS}")
    whole = new_hash()
    whole.update(first + text)
    return _entries_of(path, header, 8 + length), whole.hexdigest()


def _entries_of(path: Path, header: Mapping[str, Any], start: int) -> dict[str, _Entry]:
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
        entries[name] = _Entry(path, DTYPES[info["dtype"]], torch.Size(info["shape"]), start + begin, end - begin)
    return entries


def _unsound(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"weights file {path}", found=f"not a sound safetensors file ({why})", do="Fetch it again")
