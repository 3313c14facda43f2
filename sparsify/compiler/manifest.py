"""``sparsify.json``: what was done to a model, beside its weights, in full and without a time or a path."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sparsify.compiler.request import Request
from sparsify.compiler.result import Compiled
from sparsify.compiler.runs import PassRun
from sparsify.context import ChannelResult, RegionResult, SiteResult
from sparsify.data.batches import Calibration
from sparsify.files.manifest import FORMAT
from sparsify.frontend.source import Source
from sparsify.method.spec import spec_text


def make_manifest(compiled: Compiled, request: Request, seed: int) -> dict[str, Any]:
    """The manifest of a compile: passes with all options, data, versions, and every site."""
    calibration, source = compiled.calibration, compiled.source
    structure = source.ledger.manifest.get("structure")
    return {
        "format": FORMAT,
        "model": compiled.source.name,
        # By what the source's bytes were checked; see docs/format.md.
        "source_check": source.checked,
        **({"allow_nan": True} if source.allow_nan else {}),
        # What calibration ran in, where that was not the model's own dtype.
        **({"compute_dtype": str(source.compute).removeprefix("torch.")} if source.compute is not None else {}),
        **_as_found(source),
        # Of a source that was quantized: its format, the dtype it was read in, and bytes stored and dense.
        **({"quantized_source": dict(source.quantization)} if source.quantization is not None else {}),
        "architecture": type(compiled.source.module).__name__,
        "versions": {name: _version(name) for name in ("sparsify-fx", "torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        # What was taken out, now or before: a folder of ragged widths is read by it.
        **({"structure": structure} if structure else {}),
        "passes": [_pass(run, request, place) for place, run in enumerate(compiled.runs, len(request.structural))],
        "calibration": None if calibration is None else _calibration(calibration, seed),
        # What `sparsify compile --recipe` makes the same of again.
        **({"recipe": _recipe(request.recipe, calibration)} if request.recipe is not None else {}),
        "not_understood": [{"tensors": list(opaque.parameters), "reason": opaque.reason} for opaque in compiled.opaque],
    }


def _recipe(words: Mapping[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    """The recipe, with the source that was the default where none was named."""
    if calibration is None or "calibration" in words:
        return dict(words)
    return {**words, "calibration": "self" if calibration.label.startswith("self") else "c4"}


def _as_found(source: Source) -> dict[str, Any]:
    """Where the source's folder was other than its config.json says, and what of it was left behind."""
    weights = source.weights
    found = {
        # Tensors that the model's class has no place for.
        "unknown_tensors": list(weights.unknown),
        # Parameters that the config ties to others and whose tensors differ from theirs.
        "untied": sorted(weights.untied),
        "left_out": list(source.left_out),
        "adapter": {} if source.adapter is None else source.adapter.as_dict(),
    }
    return {key: value for key, value in found.items() if value}


def _pass(run: PassRun, request: Request, place: int) -> dict[str, Any]:
    own, named = run.applied, request.named_by_passes[place]
    return {
        "spec": spec_text(own),
        "name": own.name,
        "options": {f.name: _plain(getattr(own, f.name)) for f in dataclasses.fields(own)},
        "schedule": run.schedule,
        "ignore": [*request.ignore, *named.ignore],
        "only": list(named.only or request.only),
        "sites": [_site(site) for site in run.sites],
        **({"regions": [_region(region) for region in run.regions]} if run.regions else {}),
        **({"channels": [_channels(group) for group in run.channels]} if run.channels else {}),
        "skipped": [{"name": s.node, "reason": s.reason} for s in run.skipped],
    }


def _site(site: SiteResult) -> dict[str, Any]:
    return {
        "name": site.name,
        "tensors": site.sources,
        "shape": list(site.shape),
        "pattern": site.pattern,
        "kept": site.kept,
        "error": site.error,
        "tokens": site.tokens,
        **({"notes": site.notes} if site.notes else {}),
        **({"experts_without_tokens": site.without_data} if site.without_data else {}),
    }


def _region(region: RegionResult) -> dict[str, Any]:
    return {
        "name": region.name,
        "loss": region.loss,
        "before": region.before,
        "after": region.after,
        "rate": region.rate,
        "entries": region.entries,
        "written": region.written,
    }


def _channels(group: ChannelResult) -> dict[str, Any]:
    return {
        "name": group.name,
        "channels": group.channels,
        "lanes": group.lanes,
        "moved": group.moved,
        "kept_before": group.before,
        "kept_after": group.after,
        "written": group.written,
    }


def _calibration(data: Calibration, seed: int) -> dict[str, Any]:
    return {
        "data": data.label,
        "sequences": data.sequences,
        "sequence_length": data.sequence_length,
        "seed": seed,
        "sha256": data.digest,
        # Of a folder, how many sequences are from which file.
        **({"drawn": dict(data.drawn)} if data.drawn else {}),
        **({"chat_template": data.template} if data.template else {}),
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
