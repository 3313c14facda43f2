"""The smaller model of a round, kept in a journal: its folder, and the facts that no folder holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparsify.durable import sync_tree
from sparsify.errors import Refused
from sparsify.frontend.capture import capture
from sparsify.journal.journal import Kept
from sparsify.journal.record import Entry, damaged
from sparsify.method.structural_pass import StructuralPass
from sparsify.prune.names import Wanted
from sparsify.structure.record import Cut, Restructured
from sparsify.structure.replay import write_cut
from sparsify.structure.restructure import Captured, note, open_smaller
from sparsify.tensors import digest_of_span


def keep(kept: Kept, key: str, folder: Path, model: Captured, done: Restructured) -> None:
    """Keep ``model``, which ``folder`` holds, and what was ``done`` to make it."""
    if kept.journal is None:
        return
    sync_tree(folder)
    files = {str(p.relative_to(folder)): digest_of_span(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    said = done.as_dict() | {"skipped": [asdict(skipped) for skipped in done.skipped]}
    row = {"folder": folder.name, "files": files, "done": said, "wanted": _as_json(model.wanted)}
    kept.add(key, row, {})


def reopened(
    model: Captured, structural_pass: StructuralPass, found: Entry, mine: Entry | None, into: Callable[[], Path]
) -> tuple[Captured, Restructured]:
    """The smaller model of ``model`` that was kept, traced again, and what was done to make it.

    Args:
        found: what is known of it. mine: the same, where this process keeps it; another one makes it again of the list
            of cuts, in the folder that ``into`` gives.

    Raises:
        CheckpointError: a file of it is not what was written.
    """
    done = _done(structural_pass, found.row["done"])
    if mine is None:
        folder = into()
        write_cut(model.source, found.row["done"]["cuts"], folder, done.config)
        note(model.source, done, folder)
    else:
        folder = _as_written(mine)
    source = model.source
    smaller = replace(open_smaller(folder, source), checked=source.checked)
    program = capture(smaller, model.program.zero_batch() | model.program.literals)
    return Captured(smaller, program, _of_json(found.row["wanted"])), done


def _as_written(kept: Entry) -> Path:
    """The folder of a model that was kept."""
    folder = kept.folder / kept.row["folder"]
    for name, written in kept.row["files"].items():
        path = folder / name
        if not path.is_file() or digest_of_span(path) != written:
            raise damaged(kept.folder, f"{folder.name}/{name} is not what was written")
    return folder


def _done(structural_pass: StructuralPass, said: Mapping[str, Any]) -> Restructured:
    cuts = [
        Cut(
            **{
                **cut,
                "removed": tuple(cut["removed"]),
                "members": tuple((name, axis, tuple(stay)) for name, axis, stay in cut["members"]),
            }
        )
        for cut in said["cuts"]
    ]
    before, after = said["parameters"]
    skipped = [Refused(**each) for each in said["skipped"]]
    return Restructured(structural_pass, cuts, skipped, said["config"], (before, after))


def _as_json(wanted: Wanted) -> dict[str, Any]:
    return {
        "only": None if wanted.only is None else sorted(wanted.only),
        "ignored": sorted(wanted.ignored),
        "passes": {str(place): _as_json(own) for place, own in wanted.passes.items()},
    }


def _of_json(said: Mapping[str, Any]) -> Wanted:
    only = None if said["only"] is None else frozenset(said["only"])
    passes = {int(place): _of_json(own) for place, own in said["passes"].items()}
    return Wanted(only, frozenset(said["ignored"]), passes)
