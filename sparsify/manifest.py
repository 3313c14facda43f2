"""``sparsify.json``: what was done to a model, beside its weights, in full and without a time or a path."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import CheckpointError
from sparsify.spec import spec_text

if TYPE_CHECKING:
    from sparsify.compiler import Compiled

FORMAT = 1
MANIFEST = "sparsify.json"


def make_manifest(compiled: Compiled) -> dict[str, Any]:
    """The manifest of a compile: passes with all options, data, versions, and every site."""
    calibration, folder = compiled.calibration, compiled.source.folder
    structure = read_manifest(folder).get("structure") if folder is not None else None
    return {
        "format": FORMAT,
        "model": compiled.source.name,
        "architecture": type(compiled.source.module).__name__,
        "versions": {name: _version(name) for name in ("sparsify-fx", "torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        # What was taken out, now or before: a folder of ragged widths is read by it.
        **({"structure": structure} if structure else {}),
        "passes": [
            {
                "spec": spec_text(run.weight_pass),
                "name": run.weight_pass.name,
                "options": {
                    f.name: _plain(getattr(run.weight_pass, f.name)) for f in dataclasses.fields(run.weight_pass)
                },
                "schedule": run.schedule,
                "ignore": list(compiled.ignore),
                "only": list(compiled.only),
                "sites": [
                    {
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
                    for site in run.sites
                ],
                "skipped": [{"name": s.name, "reason": s.reason} for s in run.skipped],
            }
            for run in compiled.runs
        ],
        "calibration": None
        if calibration is None
        else {
            "data": calibration.label,
            "sequences": calibration.sequences,
            "sequence_length": calibration.sequence_length,
            "seed": compiled.seed,
            "sha256": calibration.digest,
        },
        "not_understood": [{"tensors": list(opaque.parameters), "reason": opaque.reason} for opaque in compiled.opaque],
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def read_manifest(folder: Path) -> dict[str, Any]:
    """``sparsify.json`` of ``folder``; empty where there is none."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}", found=f"not JSON ({error})", do="Compile again") from error
