"""An ordinary Hugging Face folder: what was pruned is patched into a copy of the source, all else is as it was.

``AutoModelForCausalLM.from_pretrained(OUT)`` loads it with no code of ours. There is no ``quantization_config``; facts
about the sparsity are in ``sparsify.json``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsify.errors import BackendError
from sparsify.files.checkpoint import WEIGHTS, Checkpoint
from sparsify.files.companions import copy_companions, rewrite_config
from sparsify.files.manifest import write_manifest
from sparsify.files.staging import Staging, copy_checkpoint
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.frontend.source import Source
from sparsify.host import quiet
from sparsify.ir.program import Program
from sparsify.ir.store import DenseView
from sparsify.ir.weights import Weights

_CHUNK = 16 << 20


@dataclass(frozen=True)
class HuggingFace:
    """The backend ``hf``."""

    name: ClassVar[str] = "hf"
    needs_pass: ClassVar[bool] = True

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> HuggingFaceJob:
        return HuggingFaceJob(source, out, overwrite)


class HuggingFaceJob:
    """One output folder, from a copy of the dense weights to the finished whole.

    Raises:
        BackendError: the folder exists, has no room, cannot be written, or reads back otherwise than written.
    """

    def __init__(self, source: Source, out: Path, overwrite: bool) -> None:
        self.source = source
        need = sum(p.numel() * p.element_size() for p in source.module.parameters())
        if source.checkpoint is not None:
            need = source.checkpoint.nbytes()
        # A little more for tokenizer, index and manifest.
        self.staging = Staging(out, overwrite=overwrite, source=source.folder, need=need + (32 << 20))
        try:
            self.store = self._dense_copy()
            if source.is_transformers:
                self.weights: Weights = weights_of_checkpoint(source.module, self.store)
            else:
                self.weights = source.weights.on(self.store)
        except BaseException as error:
            self.staging.__exit__(type(error), error, None)
            raise

    def _dense_copy(self) -> Checkpoint:
        source, folder = self.source, self.staging.folder
        if source.folder is not None:
            copy_companions(source.folder, folder)
            if isinstance(source.weights.store, DenseView):
                rewrite_config(folder, source.weights.store.dense_config)
        if source.checkpoint is not None:
            return copy_checkpoint(source.checkpoint, folder)
        if source.is_transformers and source.folder is None:
            # transformers reports shards in its warnings, which are not about the user's command.
            with quiet():
                source.module.save_pretrained(folder)  # type: ignore[operator]
        else:
            from safetensors.torch import save_file

            weights = source.weights
            tensors = {name: weights.store.read(name).contiguous() for name in weights.store.names()}
            save_file(without_sharing(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        return Checkpoint(folder, writable=True)

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Read everything back, write the manifest, and put the folder in place."""
        out = self.seal(manifest | {"checksums": self.verify()})
        return out, self.weights.on(Checkpoint(out))

    def notes(self) -> list[str]:
        return []

    def seal(self, manifest: dict[str, Any]) -> Path:
        """Write the manifest beside what is there, and put the folder in place."""
        write_manifest(self.staging.folder, manifest)
        for path in self.staging.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return self.staging.commit()

    def verify(self) -> dict[str, int]:
        """Check that what was pruned reads back, and that all else is what it was; the CRC-32 of every tensor."""
        back = Checkpoint(self.staging.folder)
        sums = {}
        for name in back.names():
            sums[name] = back.checksum(name)
            dense = self.source.checkpoint
            if name in self.store.written:
                if sums[name] != self.store.written[name]:
                    raise self._differs(name)
            elif dense is not None and not _same_bytes(back, dense, name):
                raise self._differs(name)
        return sums

    def _differs(self, name: str) -> BackendError:
        return BackendError(
            f"output {self.staging.out}",
            found=f"tensor {name} reads back otherwise than it was written",
            do="Check the disk and run again; nothing was left",
        )

    def __enter__(self) -> HuggingFaceJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.staging.__exit__(*error)


def _same_bytes(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    path, start, size = one.span(name)
    other_path, other_start, other_size = other.span(name)
    if size != other_size:
        return False
    with path.open("rb") as a, other_path.open("rb") as b:
        a.seek(start)
        b.seek(other_start)
        left = size
        while left:
            part = min(left, _CHUNK)
            if a.read(part) != b.read(part):
                return False
            left -= part
    return True


def without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, once: safetensors refuses shared memory."""
    first: dict[int, str] = {}
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if first.setdefault(tensor.data_ptr(), name) == name or not tensor.numel():
            own[name] = tensor
        else:
            own[name] = tensor.clone(memory_format=torch.contiguous_format)
    return own
