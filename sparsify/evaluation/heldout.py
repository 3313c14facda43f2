"""Whether text that a model is measured on is what it was made with, by what its folder says."""

from __future__ import annotations

import re
from pathlib import Path

from sparsify.files.reading import kind_at
from sparsify.frontend.source import Source
from sparsify.provenance.history import earlier

# What is said of a source behind its name: how many files a folder had, and which part of it was taken.
_BEHIND = re.compile(r"( \((\d+ files?|its first 90%)\))+$")


def with_use(label: str, data: str, source: Source) -> str:
    """``label`` and, where ``source`` was calibrated or tuned on the documents that ``data`` names, that it was.

    Its ``sparsify.json`` names them as they were named then: the same name, or a name of the same file, is the same
    source. The other part of a source in parts has another name.
    """
    manifest = source.ledger.manifest
    records = [(how, manifest.get(key)) for how, key in (("calibrated", "calibration"), ("tuned", "tuned"))]
    # What was done before, of which the rest of the manifest says nothing.
    for run in earlier(manifest):
        records += [("calibrated", run.get("calibration")), ("tuned", run)]
    for how, record in records:
        named = record.get("data") if isinstance(record, dict) else None
        if isinstance(named, str) and _same(_BEHIND.sub("", named), _BEHIND.sub("", label), data):
            return f"{label} (on which the model was {how}: not held out)"
    return label


def _same(named: str, label: str, data: str) -> bool:
    if named == label:
        return True
    one, other = (name if kind_at(name) else name.rpartition(":")[0] for name in (named, data))
    if not one or not other or kind_at(one) is None or kind_at(other) is None:
        return False
    return Path(one).expanduser().samefile(Path(other).expanduser())
