"""Where a source's folder was other than its config.json says, and what of it was left behind, for people."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from sparsify.files.reading import read_json
from sparsify.frontend.source import Source
from sparsify.ir.store import RenamedStore


def source_notes(source: Source, unknown: str = "carried over as they are") -> list[str]:
    """One sentence for each such thing.

    Args:
        unknown: what becomes of tensors that the model's class has no place for.
    """
    kind, notes = type(source.module).__name__, []
    if source.adapter is not None:
        notes.append(f"merged an adapter of rank {source.adapter.config.get('r')} into the weights")
    if source.folder is not None and (source.folder / "config.json").is_file():
        said = read_json(source.folder / "config.json").get("architectures") or ["no class"]
        if source.is_transformers and kind not in said and hasattr(transformers, kind):
            notes.append(f"config.json names {said[0] if isinstance(said, list) else said}: read as {kind}, which fits")
    if isinstance(source.weights.store, RenamedStore):
        notes.append("tensors are written without the names of wrappers (_orig_mod., module.) that were in theirs")
    if source.weights.untied:
        notes.append(
            f"config.json ties {_some(sorted(source.weights.untied))} to another parameter and the file holds another "
            "tensor for it: kept apart, as transformers does"
        )
    if source.weights.unknown:
        count = len(source.weights.unknown)
        notes.append(f"{unknown}: {count} tensors that {kind} has no place for ({_some(source.weights.unknown)})")
    if source.left_out:
        notes.append(f"left out of the output: {_some(source.left_out, 8)}")
    return notes


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
