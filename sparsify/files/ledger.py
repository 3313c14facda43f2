"""Bytes held against what ``sparsify.json`` says was written: of every tensor, weight file's header and other file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.files.manifest import (
    AS_WRITTEN,
    FORMAT,
    MANIFEST,
    PARTS,
    damaged,
    digest_of_manifest,
    read_manifest,
    sealed_manifest,
    write_json,
)
from sparsify.files.reading import admit
from sparsify.finite import Scan, check_finite, infinities_allowed, refuse
from sparsify.tensors import BLAKE, CRC, digest, digest_of_span

# By what the bytes of a folder were checked: "none" where it holds nothing of the kind, "skipped" where a user said so.
Checked = Literal["blake2b-256", "crc-32", "none", "skipped"]
HEADER_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Ledger:
    """What a folder of ours says of its bytes.

    Attributes:
        folder: None for what is no folder. manifest: the whole of ``sparsify.json``.
        tensors, headers, files: digests (hexadecimal) by the names of tensors, of safetensors files (whose headers
            say what the tensors are), and of all other files.
        finite: whether what is read or copied may hold no NaN and no infinity.
    """

    folder: Path | None = None
    checked: Checked = "none"
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tensors: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    finite: bool = False

    @classmethod
    def of(cls, folder: Path, check: bool = True, *, finite: bool = False) -> Ledger:
        """Read the ledger of ``folder``.

        Args:
            check: False knows nothing of any byte, and lets all of them pass. finite: refuse NaN and infinity.

        Raises:
            CheckpointError: a manifest that is damaged or of a newer format.
        """
        return replace(cls._read(folder, check), finite=finite)

    @classmethod
    def _read(cls, folder: Path, check: bool) -> Ledger:
        if not check:
            return cls(folder, "skipped", read_manifest(folder))
        manifest = sealed_manifest(folder)
        if not manifest:
            return cls(folder, "none", manifest)
        if "digests" in manifest:
            digests = manifest["digests"]
            if digests.get("algorithm") != BLAKE:
                raise damaged(folder, f"digests by {digests.get('algorithm')!r}")
            tensors, headers, files = (dict(digests[part]) for part in PARTS)
            return cls(folder, BLAKE, manifest, tensors, headers, files)
        if not (sums := manifest.get("checksums", {})):
            raise damaged(folder, "no checksums in it")
        if not isinstance(sums, Mapping) or not all(type(value) is int for value in sums.values()):
            raise damaged(folder, "checksums that are no numbers")
        return cls(folder, CRC, manifest, {name: f"{value & 0xFFFFFFFF:08x}" for name, value in sums.items()})

    @property
    def algorithm(self) -> str:
        return CRC if self.checked == CRC else BLAKE

    @property
    def complete(self) -> bool:
        """Whether every tensor and weight file that belongs to the folder is in here."""
        return self.checked == BLAKE

    def wants(self, name: str) -> bool:
        """Whether the bytes of tensor ``name`` are to be checked."""
        return name in self.tensors or self.complete

    def check_tensor(self, name: str, tensor: Tensor) -> None:
        """Raises:
        CheckpointError: ``tensor``, read under ``name``, is not what was written, or not finite.
        """
        if self.wants(name):
            self.compare("tensor", self.tensors, name, digest(tensor, self.algorithm))
        if self.finite:
            check_finite(name, tensor, str(self.folder))

    def scan(self, name: str, dtype: torch.dtype) -> Scan | None:
        """What is to be shown the bytes of tensor ``name`` when they are copied; None where nothing is."""
        return Scan(dtype, infinities_allowed(name)) if self.finite and Scan.reads(dtype) else None

    def check_scan(self, name: str, found: Scan | None, shape: torch.Size) -> None:
        """Raises:
        CheckpointError: the scan of tensor ``name`` found NaN or infinity.
        """
        if found is not None:
            refuse(name, found, shape, str(self.folder))

    def check_header(self, file: str, found: str, held: Collection[str] | None = None) -> None:
        """The same for the header of a safetensors file, by its digest.

        Args:
            held: the tensors of all files of the folder, to say which there are too few or too many of.
        """
        if not self.complete:
            return
        if held is not None and file in self.headers and self.headers[file] != found:
            if lacking := sorted(self.tensors.keys() - held):
                raise self.lacks(lacking)
            if added := sorted(set(held) - self.tensors.keys()):
                found = f"{MANIFEST} does not know it ({len(added)} of the kind): {file} was written again"
                raise self.unlike(f"tensor {added[0]} of {self.folder}", found)
        self.compare("header of", self.headers, file, found)

    def check_file(self, path: Path, name: str | None = None) -> None:
        """The same for any other file, by its path in the folder; one that was added later is nobody's."""
        name = name or path.name
        if name in self.files:
            self.compare("file", self.files, name, digest_of_span(admit(path)))

    def compare(self, kind: str, known: Mapping[str, str], name: str, found: str) -> None:
        """Raises:
        CheckpointError: ``found`` is not the digest of ``name`` in ``known``.
        """
        if name not in known:
            why = f"{MANIFEST} does not know it"
        elif known[name] != found:
            why = f"its bytes are not those that were written (checksum of {MANIFEST})"
        else:
            return
        raise self.unlike(f"{kind} {name} of {self.folder}", why)

    def lacks(self, names: Sequence[str]) -> CheckpointError:
        """What is raised where tensors are not there."""
        found = f"{self.folder} does not hold it, where {MANIFEST} says that it was written ({len(names)} missing)"
        return self.unlike(f"tensor {names[0]}", found)

    def unlike(self, asked: str, found: str) -> CheckpointError:
        """What is raised where the folder is not as it was written."""
        return CheckpointError(asked, found=found, do=AS_WRITTEN)


def write_manifest(
    folder: Path, manifest: Mapping[str, Any], tensors: Mapping[str, str], files: Mapping[str, str] | None = None
) -> None:
    """Put ``sparsify.json`` into the finished ``folder``, with the digests of all that lies there.

    Args:
        tensors: the digest of each tensor. files: those of files that are known already.
    """
    headers, others = {}, dict(files or {})
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        # Tensors in sub-folders are not the model's: their files are held as a whole.
        if path.suffix == HEADER_SUFFIX and path.parent == folder:
            headers[name] = digest_of_header(path)
        elif name != MANIFEST and name not in others:
            others[name] = digest_of_span(path)
    kept = {key: value for key, value in manifest.items() if key not in ("format", "checksums", "digests")}
    digests: dict[str, Any] = {"algorithm": BLAKE, "tensors": dict(tensors), "headers": headers, "files": others}
    # As it will be read: keys are texts then, and tuples lists.
    content = json.loads(json.dumps({"format": FORMAT, **kept, "digests": digests}))
    write_json(folder / MANIFEST, content | {"digests": {"manifest": digest_of_manifest(content), **digests}})


def digest_of_header(path: Path) -> str:
    """Of a safetensors file: of its first 8 bytes and the table of tensors that follows.

    Raises:
        CheckpointError: it ends before.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    try:
        return digest_of_span(path, 0, 8 + length)
    except EOFError as error:
        raise CheckpointError(f"reading {path}", found=f"it ended early ({error})", do="Fetch it again") from error
