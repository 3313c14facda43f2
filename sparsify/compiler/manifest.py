"""``sparsify.json``: what was done to a model, beside its weights, in full; of times the date alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sparsify.compiler.request import Request
from sparsify.compiler.result import Compiled
from sparsify.compiler.runs import PassRun
from sparsify.context import ChannelResult, RegionResult, SiteResult
from sparsify.data.batches import Calibration
from sparsify.files.manifest import FORMAT
from sparsify.frontend.source import Source
from sparsify.ir.weights import Weights
from sparsify.method.spec import spec_text
from sparsify.provenance.history import entry, origin_of, versions
from sparsify.provenance.runs import earlier
from sparsify.structure.record import Restructured


def make_manifest(compiled: Compiled, request: Request, seed: int, opened: Source) -> dict[str, Any]:
    """The manifest of a compile: passes with all options, data, versions, every site, and what came before.

    Args:
        opened: the model as the user named it, which structural passes leave for a smaller one.
    """
    calibration, source = compiled.calibration, compiled.source
    structure, before = source.ledger.manifest.get("structure"), opened.ledger.manifest
    data = None if calibration is None else _calibration(calibration, seed)
    recipe = None if request.recipe is None else _recipe(request.recipe, calibration)
    return {
        "format": FORMAT,
        "model": compiled.source.name,
        **as_opened(source),
        # What calibration ran in, where that was not the model's own dtype.
        **({"compute_dtype": str(source.compute).removeprefix("torch.")} if source.compute is not None else {}),
        "architecture": type(compiled.source.module).__name__,
        "versions": versions(),
        "history": [
            *earlier(before),
            entry(
                "compile",
                request.date,
                origin_of(opened),
                [*map(_cut, compiled.structure), *map(_ran, compiled.runs)],
                calibration=data,
                recipe=recipe,
                whole=_whole(compiled),
            ),
        ],
        # That the card beside the source is ours; see sparsify/provenance/dense_card.py.
        **({"card": before["card"]} if "card" in before else {}),
        # What was taken out, now or before: a folder of ragged widths is read by it.
        **({"structure": structure} if structure else {}),
        "passes": [_pass(run, request, place) for place, run in enumerate(compiled.runs, len(request.structural))],
        "calibration": data,
        # What `sparsify compile --recipe` makes the same of again.
        **({"recipe": recipe} if recipe is not None else {}),
        "not_understood": [{"tensors": list(opaque.parameters), "reason": opaque.reason} for opaque in compiled.opaque],
    }


def _cut(done: Restructured) -> dict[str, Any]:
    """What the history says of a round of a structural pass."""
    return {"spec": spec_text(done.structural_pass), "parameters": list(done.parameters)}


def _ran(run: PassRun) -> dict[str, Any]:
    """What it says of any other pass: how many weights it pruned or rounded, what is left of them, their mean error."""
    errors = [site.error for site in run.sites if site.error is not None]
    return {
        "spec": spec_text(run.applied),
        **({"rounded" if run.rounds else "pruned": len(run.sites), "left": run.kept} if run.sites else {}),
        **({"error": sum(errors) / len(errors)} if errors else {}),
    }


def _whole(compiled: Compiled) -> dict[str, Any]:
    """How much is left; of weights that a pass pruned last by what it says of them."""
    weights, known = compiled.program.weights, dict[str, int]()
    for run in compiled.runs:
        for name in run.written:
            known.pop(name, None)
        known |= {s.parameter: round(s.kept * math.prod(s.shape)) for s in run.sites if _is_whole(s, weights)}
    return whole_of(weights, known)


def whole_of(weights: Weights, known: Mapping[str, int] | None = None) -> dict[str, Any]:
    """How many numbers the model has, and which share of them is not zero: counted, but for weights that are
    ``known``.
    """
    known, every, left = known or {}, 0, 0
    for name in weights.parameters():
        size = math.prod(weights.shape(name))
        every += size
        left += known[name] if name in known else int(weights.read(name).count_nonzero())
    return {"numbers": every, "kept": left / max(1, every)}


def _is_whole(site: SiteResult, weights: Weights) -> bool:
    return math.prod(site.shape) == math.prod(weights.shape(site.parameter))


def _recipe(words: Mapping[str, Any], calibration: Calibration | None) -> dict[str, Any]:
    """The recipe, with the source that was the default where none was named."""
    if calibration is None or "calibration" in words:
        return dict(words)
    return {**words, "calibration": "self" if calibration.label.startswith("self") else "c4"}


def as_opened(source: Source) -> dict[str, Any]:
    """How the source was read, where its folder was other than its config.json says, and what of it was left behind."""
    weights = source.weights
    found = {
        # By what its bytes were checked; see docs/format.md.
        "source_check": source.checked,
        "allow_nan": source.allow_nan,
        # Tensors that the model's class has no place for.
        "unknown_tensors": list(weights.unknown),
        # Parameters that the config ties to others and whose tensors differ from theirs.
        "untied": sorted(weights.untied),
        "left_out": list(source.left_out),
        "adapter": {} if source.adapter is None else source.adapter.as_dict(),
        # Of one that was quantized: its format, the dtype it was read in, and bytes stored and dense.
        "quantized_source": dict(source.quantization or {}),
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
        # Those that were pruned: what rounds them promises no zeros.
        "sites": [] if run.rounds else [_site(site) for site in run.sites],
        **({"rounded": [_site(site) for site in run.sites]} if run.rounds else {}),
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
