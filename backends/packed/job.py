"""A packed folder: a dense copy is pruned, then packed tensor by tensor, then dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.hf.job import HuggingFaceJob
from sparsify.backends.packed.choosing import PRUNED, Asked, Decision
from sparsify.backends.packed.config import METHOD, format_of
from sparsify.backends.packed.format import PackedSite
from sparsify.backends.packed.grids import Values
from sparsify.backends.packed.loaded.known import this_machine
from sparsify.backends.packed.loaded.modules import pack_modules
from sparsify.backends.packed.options import Options
from sparsify.backends.packed.plan import decide, siblings, summary
from sparsify.backends.packed.store import PackedStore
from sparsify.backends.packed.writing import differences, write_packed
from sparsify.context import Progress, report
from sparsify.errors import BackendError, TraceError
from sparsify.files.checkpoint import INDEX, Checkpoint
from sparsify.files.companions import rewrite_config
from sparsify.files.writer import layout_of, layout_to_json
from sparsify.frontend.building.widths import sizes_of
from sparsify.frontend.capture import export
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.method.spec import parse_pass

# What transformers prints where it does not know the method leads to config.json.
NOTE = (
    "packed by sparsify: pip install sparsify-fx; then `import sparsify` before transformers' from_pretrained, "
    "`sparsify serve`, or vLLM, which finds the plug-in itself"
)


class PackedJob:
    """One output folder.

    Raises:
        BackendError: no model that transformers loads, nothing in it is worth packing, or the folder cannot be written.
    """

    def __init__(self, source: Source, out: Path, *, overwrite: bool, options: Options) -> None:
        check_loadable(source)
        self.source, self.asked = source, options
        self.hf = HuggingFaceJob(source, out, overwrite=overwrite)
        self.weights: Weights = self.hf.weights
        self.decisions: list[Decision] = []
        self._settled = False
        # Why nothing is packed, where the folder is an ordinary one.
        self.unpacked: str | None = None

    @property
    def sites(self) -> dict[str, PackedSite]:
        """The parameters that are packed."""
        return {d.name: d.site for d in self.decisions if d.site is not None}

    @property
    def few(self) -> bool:
        """Whether some weight is stored as integers."""
        return any(site.bits is not None for site in self.sites.values())

    def options(self) -> dict[str, str | bool]:
        """The backend's options, as the manifest has them: those of integers where there are any."""
        own = self.asked
        few: dict[str, str | bool] = {"values": own.values, "activations": own.activations}
        group = {"group": own.group} if own.group is not None else {}
        asked = own.values != "auto" or self.few
        copies = {"policy": own.policy} if own.policy != "decode" else {}
        return {"layout": own.layout, "choice": own.choice} | (few | group if asked else {}) | copies

    def decide(self, program: Program, manifest: Mapping[str, Any] | None = None) -> list[Decision]:
        """What becomes of every weight; those that are rounded are, in the output's own.

        Args:
            manifest: what is known of the model; None before that is.
        """
        own = self.asked
        values = Values(own.values, own.group, meant=manifest is None or was_rounded(manifest))
        asked = Asked(own.layout, own.choice, values, own.activations == "float")
        return decide(program, self.weights, self.source.module, asked)

    def settle(self, program: Program) -> None:
        """Round what is to be rounded, before the result is judged or its numbers are told."""
        if self.asked.values in ("int8", "int4"):
            self.decisions, self._settled = self.decide(program), True

    def extras(self) -> dict[str, object]:
        """What config.json says beside the sites."""
        return {"cpu": {"policy": self.asked.policy}} if self.asked.policy != "decode" else {}

    def records(self) -> list[dict[str, Any]]:
        """What ``sparsify.json`` says of every weight."""
        return [d.as_dict() for d in self.decisions]

    def edit(self, model: nn.Module) -> None:
        """Make ``model``, without weights, what a loader makes of it."""
        pack_modules(model, self.sites, siblings(self.decisions), exact=self.asked.activations == "float")

    def finish(self, program: Program, manifest: dict[str, Any]) -> tuple[Path, Weights]:
        """Pack, read back, and put the folder in place.

        Where no weight is worth packing, what passes have pruned is written as an ordinary checkpoint: no timing
        discards their work.
        """
        folder, weights = self.hf.staging.folder, self.weights
        if not self._settled:
            self.decisions = self.decide(program, manifest)
            if any(d.rounding is not None for d in self.decisions):
                manifest.pop("evaluation", None)  # it was made of the weights before
        sums = self.hf.verify()
        if not self.sites:
            reasons = "; ".join(f"{d.name}: {d.reason}" for d in self.decisions[:3])
            advice = self.advice(any(d.zeros >= PRUNED or d.on_grid for d in self.decisions))
            found = f"no weight is worth packing ({reasons})"
            if not manifest["passes"]:
                raise BackendError(f"packing {self.source.name}", found=found, do=advice)
            self.unpacked = f"{found}: OUT is an ordinary checkpoint, as --to hf writes. {advice}"
            manifest["not_packed"] = {**self.options(), "sites": self.records()}
            path = self.hf.seal(manifest, sums)
            return path, weights.on(Checkpoint(path))
        dense = layout_of(self.hf.store)
        sums = self._write(folder, program)
        rewrite_config(folder, lambda config: {**config, "quantization_config": self._quantization()})
        manifest["packed"] = {
            "format": format_of(self.sites),
            **self.options(),
            "sites": self.records(),
            "dense_files": layout_to_json(dense),
        }
        path = self.hf.seal(manifest, sums)
        names = {name: name for name in weights.parameters()}
        store = PackedStore(path, self.sites)
        packed = Weights(store, names, aliases=weights.aliases, model=self.source.module)
        packed.unknown, packed.untied = weights.unknown, weights.untied
        return path, packed

    def advice(self, pruned: bool) -> str:
        """What to do where nothing is packed: "prune it first" to nobody who did."""
        smaller = "take --to packed:choice=smallest to pack for size alone"
        first = "prune it first (--pass wanda:2:4), or round it (values=int8)"
        known = [first] * (not pruned) + [smaller] * (self.asked.choice == "measured")
        text = ", or ".join(known or ["write --to hf"])
        return text[0].upper() + text[1:]

    def _write(self, folder: Path, program: Program) -> dict[str, str]:
        """The packed weight files in the place of the dense ones, checked before those go; the digest of each."""
        # No name of the source's: hidden ones are not carried.
        inside = folder / ".packed"
        inside.mkdir()
        sums = write_packed(inside, self.weights, self.decisions)
        for name, found, do in differences(PackedStore(inside, self.sites), self.weights, sums):
            out = self.hf.staging.out
            raise BackendError(f"output {out}", found=f"{name} {found}", do=f"{do}; no output was left")
        self._try_modules(program)
        for path in [*self.hf.store.files, folder / INDEX]:
            path.unlink(missing_ok=True)
        for path in inside.iterdir():
            path.rename(folder / path.name)
        inside.rmdir()
        return sums

    def _quantization(self) -> dict[str, Any]:
        """What config.json says of the packed weights."""
        entries = {name: site.as_dict() for name, site in self.sites.items()}
        content = {"quant_method": METHOD, "note": NOTE, "format": format_of(self.sites), "sites": entries}
        together = siblings(self.decisions)
        few = {"activations": self.asked.activations} if self.few else {}
        # A choice by size alone holds anywhere.
        where = {"measured": this_machine()} if self.asked.choice == "measured" else {}
        return content | ({"siblings": together} if together else {}) | few | where | self.extras()

    def _try_modules(self, program: Program) -> None:
        """Trace the model with its packed modules: code that computes with a packed weight itself fails here."""
        source = self.source
        if source.folder is None:
            return
        report(Progress("tracing", what="the model with its packed layers"))
        module = source.skeleton(self.edit)
        try:
            export(module, {**_inputs_of(program, source), **program.literals})
        except TraceError as error:
            raise BackendError(
                f"packing {source.name}",
                found=f"the model does not run with packed layers ({error.found})",
                do="Leave out what it computes with itself (--ignore), or write --to hf",
            ) from error

    def notes(self) -> list[str]:
        return [*self.hf.notes(), *(summary(self.decisions) if self.unpacked is None else [self.unpacked])]

    def __enter__(self) -> PackedJob:
        return self

    def __exit__(self, *error: Any) -> None:
        self.hf.__exit__(*error)


def was_rounded(manifest: Mapping[str, Any]) -> bool:
    """Whether a pass rounded the model, in this run or in one before."""
    runs = (own for run in manifest.get("history", ()) for own in run.get("passes", ()))
    return any("rounded" in own or parse_pass(own["spec"]).leaves == "rounding" for own in runs)


def _inputs_of(program: Program, source: Source) -> dict[str, Tensor]:
    """The inputs that ``program`` was traced with; in the model's own dtype where it runs in another."""
    values: dict[str, Tensor] = {n.meta["input"]: n.meta["val"] for n in program.inputs}
    if source.compute is None:
        return values
    own = next((p.dtype for p in source.module.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(own) if value.is_floating_point() else value for name, value in values.items()}


def check_loadable(source: Source) -> None:
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
            f"packing {source.name}",
            found="layers of different widths, and transformers loads packed folders",
            do="Prune it to uniform widths, or write --to hf and load it with sparsify.load",
        )
