"""The text that judges a model: windows of it, and whether the model was made with it, by what its folder says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.data.batches import evaluation_windows
from sparsify.data.chat import Chat
from sparsify.data.given import are_texts
from sparsify.data.inputs import are_ids
from sparsify.errors import CalibrationError, SpecError
from sparsify.files.reading import kind_at
from sparsify.frontend.source import Source
from sparsify.provenance.runs import earlier

# What is said of a source behind its name: how many files a folder had, and which part of it was taken.
_BEHIND = re.compile(r"( \((\d+ files?|its first 90%)\))+$")


def windows_of(
    data: Any, source: Source, limit: int | None, length: int | None, chat: Chat, *, both: bool = False
) -> tuple[Tensor, str]:
    """Windows [count, length] of token ids, and where they are from.

    Args:
        data: a source's name, texts, or token ids [windows, length], which are taken as they are.
        limit: the first so many windows only. length: tokens of each; None: as many as the model is used to.
        both: the source calibrates as well, and is cut in two; see :func:`sparsify.data.batches.load_calibration`.

    Raises:
        CalibrationError: data that are missing or too short. SpecError: a length that cannot be had.
    """
    if isinstance(data, str):
        ids, label = evaluation_windows(data, source, length, limit, chat, both=both)
        return ids, with_use(label, data, source)
    if are_texts(data):
        return evaluation_windows(data, source, length, limit, chat)
    if not isinstance(data, Tensor) or data.dim() != 2 or 0 in data.shape or not are_ids(data):
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
        raise CalibrationError(
            "data to evaluate on",
            found=found,
            do="Give a source's name or path, a list of texts, or token ids [windows, length]",
        )
    if length is not None and length != data.shape[1]:
        found = f"windows of {data.shape[1]} token ids, which are taken as they are"
        raise SpecError(f"sequence length {length}", found=found, do="Leave sequence_length out")
    return data[:limit].cpu(), "token ids given in Python"


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
