"""A structural pass in its rounds: each writes a smaller model, which all that follows takes for the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparsify.calibration.gradients import Samples
from sparsify.context import Context, Progress
from sparsify.errors import BackendError
from sparsify.frontend.modules import save_module
from sparsify.frontend.source import Source, open_source
from sparsify.journal.journal import NOT_KEPT, Kept
from sparsify.journal.shared import shared
from sparsify.method.spec import spec_text
from sparsify.method.structural_pass import StructuralPass
from sparsify.structure.kept import keep, reopened
from sparsify.structure.record import Restructured
from sparsify.structure.restructure import Captured, restructure


def check_source(source: Source) -> None:
    """Raises:
    BackendError: not a transformers model: its config could not say the new widths.
    """
    if not source.is_transformers or source.config is None:
        raise BackendError(
            f"making {source.name} smaller",
            found="not a transformers model, whose config says its widths",
            do="Cut its graph in Python: sparsify.structure.shrink.shrink with what coupled_dimensions(program) finds",
        )


def in_a_folder(source: Source, place: Path) -> Source:
    """``source``, saved below ``place`` where it is a module in memory."""
    if source.folder is not None:
        return source
    saved = place / "saved"
    saved.mkdir()
    save_module(source.module, saved)
    # What was saved was looked at when it was opened.
    opened = open_source(saved, allow_nan=True, tokenizer=source.given_tokenizer)
    return replace(opened, name=source.name, allow_nan=source.allow_nan, compute=source.compute)


def make_smaller(
    model: Captured,
    structural_pass: StructuralPass,
    data: Samples | None,
    place: Path,
    context: Context,
    number: int = 0,
    kept: Kept = NOT_KEPT,
) -> tuple[Captured, list[Restructured]]:
    """Run the rounds of a pass, each into a folder of its own below ``place``: the last model, and what was done.

    Args:
        number: of the pass among all. kept: rounds that a run before has finished, and where those of this one are
            kept, in whose folder they lie then.

    Raises:
        SpecError, BackendError: as :func:`restructure`. CheckpointError: a model that was kept is damaged.
    """
    done: list[Restructured] = []
    rounds = list(structural_pass.rounds())
    # The first process keeps; all know what.
    everywhere = shared(kept, context.world)

    def scratch() -> Path:
        into = place / str(sum(1 for _ in place.iterdir()))
        into.mkdir()
        return into

    for at, one in enumerate(rounds):
        context.observe(Progress("making the model smaller", at, len(rounds), spec_text(structural_pass), "round"))
        found = everywhere.find(f"round {at}")
        if found is not None:
            model, record = reopened(model, one, found, kept.find(f"round {at}"), scratch)
        else:
            into = kept.subfolder(f"smaller-{number}-{at}") or scratch()
            model, record = restructure(model, one, data, into, context, number)
            keep(kept, f"round {at}", into, model, record)
        done.append(record)
    return model, done
