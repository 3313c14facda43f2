"""An ordinary Hugging Face folder: what was pruned is patched into a copy of the source, all else is as it was.

``AutoModelForCausalLM.from_pretrained(OUT)`` loads it with no code of ours. There is no ``quantization_config``; facts
about the sparsity are in ``sparsify.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.backends.hf.saving import save_tensors
from sparsify.errors import BackendError
from sparsify.files.checkpoint import WEIGHTS, Checkpoint
from sparsify.files.ledger import write_manifest
from sparsify.files.staging import Staging
from sparsify.files.writer import lay_out
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.frontend.source import Source
from sparsify.host import quiet
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights

# Tokenizer, index and manifest take a little more than the weights.
_BESIDE = 32 << 20


class HuggingFaceJob:
    """One output folder, from a copy of the dense weights to the finished whole.

    Raises:
        BackendError: the folder exists, has no room, cannot be written, or reads back otherwise than written.
    """

    def __init__(self, source: Source, out: Path, *, overwrite: bool) -> None:
        self.source = source
        need = sum(p.numel() * p.element_size() for p in source.module.parameters())
        if source.checkpoint is not None:
            need = source.checkpoint.nbytes()
        self.staging = Staging(out, overwrite=overwrite, source=source.folder, need=need + _BESIDE)
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
            source.copy_beside(folder)
        if source.checkpoint is not None:
            return source.checkpoint.copy_to(folder)
        if source.is_transformers and source.folder is None:
            model: Any = source.module
            # transformers reports shards in its warnings, which are not about the user's command.
            with quiet():
                model.save_pretrained(folder)
        elif source.folder is not None:
            return self._written_anew(folder)
        else:
            store = source.weights.store
            save_tensors({name: store.read(name).contiguous() for name in store.names()}, folder / WEIGHTS)
        return Checkpoint(folder, writable=True)

    def _written_anew(self, folder: Path) -> Checkpoint:
        """What lies otherwise in the source: one tensor after the other, in shards like transformers' own."""
        store = self.source.weights.store
        # In the order that safetensors' own writer has.
        names = sorted(store.names(), key=lambda name: (-store.dtype(name).itemsize, name))
        made = lay_out(folder, {name: (store.dtype(name), store.shape(name)) for name in names})
        for name in names:
            made.write(name, store.read(name).contiguous())
        return made

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Read everything back, write the manifest, and put the folder in place."""
        out = self.seal(manifest, self.verify())
        return out, self.weights.on(Checkpoint(out))

    def notes(self) -> list[str]:
        return []

    def seal(
        self, manifest: dict[str, Any], tensors: Mapping[str, str], files: Mapping[str, str] | None = None
    ) -> Path:
        """Write the manifest beside what is there, and put the folder in place.

        Args:
            tensors: the digest of each tensor. files: those of other files that are known already.
        """
        write_manifest(self.staging.folder, manifest, tensors, files)
        return self.staging.commit()

    def verify(self) -> dict[str, str]:
        """Check that what was pruned reads back, and that all else is what it was; the digest of every tensor."""
        sums, meant = Checkpoint(self.staging.folder).digests(), self.store.copied | self.store.written
        for name, found in sums.items():
            if meant.get(name, found) != found:
                raise BackendError(
                    f"output {self.staging.out}",
                    found=f"tensor {name} reads back otherwise than it was written",
                    do="Check the disk and run again; nothing was left",
                )
        return sums

    def __enter__(self) -> HuggingFaceJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.staging.__exit__(*error)
