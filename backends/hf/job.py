"""An ordinary Hugging Face folder: what was pruned is patched into a copy of the source, all else is as it was.

``AutoModelForCausalLM.from_pretrained(OUT)`` loads it with no code of ours. There is no ``quantization_config``; facts
about the sparsity are in ``sparsify.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsify.backends.hf.notes import source_notes
from sparsify.errors import BackendError
from sparsify.files.checkpoint import Checkpoint
from sparsify.files.companions import rewrite_config, size_of_companions
from sparsify.files.ledger import write_manifest
from sparsify.files.staging import Staging
from sparsify.files.writer import write_all
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.frontend.modules import save_module
from sparsify.frontend.source import Source
from sparsify.frontend.ties import config_of
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.provenance.card import write_card

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
        if source.folder is not None:
            need += size_of_companions(source.folder)
        self.staging = Staging(out, overwrite=overwrite, source=source.folder, need=need + _BESIDE)
        try:
            self.store = self._dense_copy()
            if source.is_transformers:
                self.weights: Weights = weights_of_checkpoint(source.module, self.store, untied=source.weights.untied)
            else:
                self.weights = source.weights.on(self.store)
        except BaseException as error:
            self.staging.__exit__(type(error), error, None)
            raise

    def _dense_copy(self) -> Checkpoint:
        source, folder = self.source, self.staging.folder
        if source.folder is not None:
            source.copy_beside(folder)
            if (folder / "config.json").is_file():
                rewrite_config(folder, self._settled)
        if source.checkpoint is not None:
            return source.checkpoint.copy_to(folder)
        if source.is_transformers and source.folder is None:
            return save_module(source.module, folder)
        store = source.weights.store
        layout = {name: (store.dtype(name), list(store.shape(name))) for name in store.names()}
        return write_all(folder, layout, lambda name: store.read(name).contiguous())

    def _settled(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json that says what was found in the weights: the class of the model, and what is not tied."""
        module: Any = self.source.module
        if type(module).__name__ not in (config.get("architectures") or ()) and "auto_map" not in config:
            config = {**config, "architectures": [type(module).__name__]}
        return config_of(module, self.source.weights.untied, config)

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Read everything back, write the manifest, and put the folder in place."""
        out = self.seal(manifest, self.verify())
        return out, self.weights.on(Checkpoint(out))

    def notes(self) -> list[str]:
        return source_notes(self.source)

    def seal(
        self, manifest: dict[str, Any], tensors: Mapping[str, str], files: Mapping[str, str] | None = None
    ) -> Path:
        """Write the card and the manifest beside what is there, and put the folder in place.

        Args:
            tensors: the digest of each tensor. files: those of other files that are known already.
        """
        write_card(self.staging.folder, manifest)
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
                    do="Check the disk and run again; no output was left",
                )
        return sums

    def __enter__(self) -> HuggingFaceJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.staging.__exit__(*error)
