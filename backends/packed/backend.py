"""The backend ``packed``: a Hugging Face folder whose pruned weights are stored, loaded and run packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from sparsify.backends.hf import HuggingFaceJob
from sparsify.backends.packed.format import FORMAT, METHOD, codes_name, pack_parameter
from sparsify.backends.packed.loaded.modules import pack_modules
from sparsify.backends.packed.plan import Decision, decide, siblings, summary
from sparsify.backends.packed.store import PackedStore
from sparsify.errors import BackendError, TraceError
from sparsify.files.checkpoint import INDEX
from sparsify.files.companions import rewrite_config
from sparsify.files.writer import lay_out, layout_of, layout_to_json
from sparsify.frontend.capture import export
from sparsify.frontend.source import Source
from sparsify.frontend.widths import sizes_of
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights

# What transformers prints where it does not know the method leads to config.json.
NOTE = "packed by sparsify: pip install sparsify-fx, and `import sparsify` before from_pretrained"


@dataclass(frozen=True)
class PackedBackend:
    """The backend ``packed``.

    Attributes:
        layout: ``auto`` takes packed24 where a weight is 2:4 along its inputs and a bitmask elsewhere.
        choice: ``measured`` leaves a weight dense where one token through it is measured to take longer packed;
            ``smallest`` packs whatever becomes smaller.
    """

    layout: Literal["auto", "packed24", "bitmask"] = "auto"
    choice: Literal["measured", "smallest"] = "measured"

    name: ClassVar[str] = "packed"
    needs_pass: ClassVar[bool] = False

    def open(self, source: Source, out: Path, *, overwrite: bool, program: Program) -> PackedJob:
        check_source(source)
        return PackedJob(self, source, out, overwrite)


def check_source(source: Source) -> None:
    """Raises:
    BackendError: transformers, who loads a packed folder, does not know the model, or its layers differ in width.
    """
    if not source.is_transformers or source.config is None:
        raise BackendError(
            f"packing {source.name}",
            found="not a transformers model, and transformers is what loads a packed folder",
            do="Lower its graph in Python instead: sparsify.passes.LowerSparse()(graph_module)",
        )
    if source.folder is not None and sizes_of(source.folder) is not None:
        raise BackendError(
            f"packing {source.name}", found="layers of different widths, and transformers loads packed folders",
            do="Prune it to uniform widths, or write --to hf and load it with sparsify.load",
        )  # fmt: skip


class PackedJob:
    """One output folder: a dense copy is pruned, then packed tensor by tensor, then dropped.

    Raises:
        BackendError: nothing in it is worth packing, or the folder cannot be written.
    """

    advice = "Prune it first (--pass wanda:2:4), or take --to packed:choice=smallest to pack for size alone"

    def __init__(self, backend: Any, source: Source, out: Path, overwrite: bool) -> None:
        self.backend, self.source = backend, source
        self.hf = HuggingFaceJob(source, out, overwrite)
        self.weights: Weights = self.hf.weights
        self.decisions: list[Decision] = []

    def decide(self, program: Program) -> list[Decision]:
        """What becomes of every weight."""
        return decide(program, self.weights, self.source.module, self.backend.layout, self.backend.choice)

    def extras(self) -> dict[str, Any]:
        """What config.json says beside the sites."""
        return {}

    def records(self) -> list[dict[str, Any]]:
        """What ``sparsify.json`` says of every weight."""
        return [d.as_dict() for d in self.decisions]

    def edit(self, model: nn.Module) -> None:
        """Make ``model``, without weights, what a loader makes of it."""
        sites = {d.name: d.site for d in self.decisions if d.site is not None}
        pack_modules(model, sites, siblings(self.decisions))

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Pack, read back, and put the folder in place."""
        folder, weights = self.hf.staging.folder, self.weights
        self.hf.verify()
        self.decisions = self.decide(program)
        sites = {d.name: d.site for d in self.decisions if d.site is not None}
        if not sites:
            reasons = "; ".join(f"{d.name}: {d.reason}" for d in self.decisions[:3])
            raise BackendError(
                f"packing {self.source.name}",
                found=f"no weight is worth packing ({reasons})",
                do=self.advice,
            )
        dense = layout_of(self.hf.store)
        inside = folder / "packed"
        inside.mkdir()
        sums = self._write(inside)
        self._verify(inside, sums, program)
        for path in [*self.hf.store.files, folder / INDEX]:
            path.unlink(missing_ok=True)
        for path in inside.iterdir():
            path.rename(folder / path.name)
        inside.rmdir()
        entries = {name: site.as_dict() for name, site in sites.items()}
        quantization = {"quant_method": METHOD, "note": NOTE, "format": FORMAT, "sites": entries}
        together = siblings(self.decisions)
        quantization |= ({"siblings": together} if together else {}) | self.extras()
        rewrite_config(folder, lambda config: {**config, "quantization_config": quantization})
        manifest["packed"] = {
            "format": FORMAT,
            **asdict(self.backend),
            "sites": self.records(),
            "dense_files": layout_to_json(dense),
        }
        manifest["checksums"] = sums
        path = self.hf.seal(manifest)
        names = {name: name for name in weights.parameters()}
        return path, Weights(PackedStore(path, sites), names, aliases=weights.aliases, model=self.source.module)

    def _write(self, folder: Path) -> dict[str, int]:
        """Every tensor into ``folder``, parameters under the model's own names; the CRC-32 of each."""
        weights, sites = self.weights, {d.name: d for d in self.decisions if d.site is not None}
        tensors: dict[str, Any] = {}
        for name in weights.parameters():
            dtype = weights.dtype(name)
            site = sites[name].site if name in sites else None
            if site is not None:
                tensors[name] = (dtype, site.values_shape)
                tensors[codes_name(name, site.layout)] = (site.codes_dtype, site.codes_shape)
            else:
                tensors[name] = (dtype, list(weights.read(name).shape))
        # What the checkpoint holds beside the parameters is carried along.
        known = {source for name in weights.parameters() for source in weights.sources(name)}
        others = [n for n in weights.store.names() if n not in known and n not in tensors]
        tensors |= {n: (weights.store.dtype(n), list(weights.store.shape(n))) for n in others}
        out = lay_out(folder, tensors)
        for name in weights.parameters():
            decision = sites.get(name)
            if decision is None or decision.site is None:
                out.write(name, weights.read(name).to(weights.dtype(name)))
                continue
            matrices = decision.linear.matrices(weights.read(name))
            site, values, codes = pack_parameter(
                matrices, decision.site.layout, stacked=decision.site.experts is not None,
                transposed=decision.site.transposed,
            )  # fmt: skip
            out.write(name, values)
            out.write(codes_name(name, site.layout), codes)
        for name in others:
            out.write(name, weights.store.read(name))
        return dict(out.written)

    def _verify(self, folder: Path, sums: Mapping[str, int], program: Program) -> None:
        """Check that what was written unpacks to the weights, and that the model runs with packed modules."""
        sites = {d.name: d.site for d in self.decisions if d.site is not None}
        store = PackedStore(folder, sites)
        for name, crc in sums.items():
            if store.checkpoint.checksum(name) != crc:
                raise self._broken(name, "reads back otherwise than it was written", "Check the disk and run again")
        for name in sites:
            # Equal as numbers: a pruned weight may be -0.0, which is packed as zero.
            if not bool((store.read(name) == self.weights.read(name)).all()):
                raise self._broken(name, "unpacks to other values", "Report this as a bug")
        self._try_modules(program)

    def _try_modules(self, program: Program) -> None:
        """Trace the model with its packed modules: code that computes with a packed weight itself fails here."""
        source = self.source
        if source.folder is None:
            return
        module = source.skeleton(self.edit)
        batch = {n.meta["input"]: torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in program.inputs}
        try:
            export(module, batch)
        except TraceError as error:
            raise BackendError(
                f"packing {source.name}",
                found=f"the model does not run with packed layers ({error.found})",
                do="Leave out what it computes with itself (--ignore), or write --to hf",
            ) from error

    def _broken(self, name: str, found: str, do: str) -> BackendError:
        return BackendError(f"output {self.hf.staging.out}", found=f"{name} {found}", do=f"{do}; nothing was left")

    def notes(self) -> list[str]:
        return summary(self.decisions)

    def __enter__(self) -> PackedJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.hf.__exit__(*error)
