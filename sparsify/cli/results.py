"""What ``sparsify compile --json`` and ``sparsify eval --json`` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsify.cli.tables import OTHER_WINDOWS, pairs
from sparsify.compiler.runs import zeros_of
from sparsify.host import peak_memory
from sparsify.method.spec import spec_text
from sparsify.quality.evaluation import paired_as_dict
from sparsify.structure.plan import count_parameters

if TYPE_CHECKING:
    from sparsify.compiler.result import Compiled
    from sparsify.quality.evaluation import Evaluation


def result_as_dict(compiled: Compiled, seconds: float, *, planned: bool) -> dict[str, Any]:
    """A compile for JSON: the plan where nothing ran, else what became of every site, and the manifest's own words.

    Args:
        planned: whether it was a dry run.
    """
    data = compiled.calibration
    found: dict[str, Any] = {
        "model": compiled.source.name,
        "dry_run": planned,
        "output": None if compiled.output is None else str(compiled.output),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(),
        "parameters": count_parameters(compiled.source),
        "calibration": None if data is None else {"data": data.said, "size": data.size, "text": not data.plumbing},
        "structure": [done.as_dict() for done in compiled.structure],
        "notes": list(compiled.notes),
    }
    if not planned:
        found["kept"] = 1 - zeros_of(compiled.runs) / max(1, found["parameters"])
        found["evaluation"] = None if compiled.evaluation is None else compiled.evaluation.as_dict()
        found["seconds_by_pass"] = [run.seconds for run in compiled.runs]
        told = ("passes", "not_understood", "versions", "processes")
        return found | {key: compiled.manifest[key] for key in told if key in compiled.manifest}
    found["passes"] = [
        {
            "spec": spec_text(run.applied),
            "targets": [
                {"name": t.site.name, "shape": list(t.site.shape), "experts": t.site.experts} for t in run.targets
            ],
            "skipped": [{"name": s.node, "reason": s.reason} for s in run.skipped],
        }
        for run in compiled.runs
    ]
    return found


def evaluations_as_dicts(results: Sequence[tuple[str, Evaluation]]) -> list[dict[str, Any]]:
    """Evaluations for JSON; of the second and every later one how it stands against the first."""
    rows = [{"model": name, **result.as_dict()} for name, result in results]
    first = results[0][1]
    none = {"ratio": None, "standard_error": None, "verdict": OTHER_WINDOWS}
    if first.windows and all(result.windows for _, result in results):
        for row, paired in zip(rows[1:], pairs(results), strict=True):
            row["against_the_first"] = none if paired is None else paired_as_dict(paired)
    if first.scores:
        for row, (_, result) in zip(rows[1:], results[1:], strict=True):
            row["scores_against_the_first"] = [pair.as_dict() for pair in result.differences(first)]
    return rows
