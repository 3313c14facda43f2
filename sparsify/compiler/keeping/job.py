"""Which job a compile is, told by everything that decides its numbers; its journal; what an earlier one left."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsify.analysis.graph_pass import GraphPass
from sparsify.compiler.request import Request
from sparsify.compiler.runs import PassRun
from sparsify.context import Context
from sparsify.data.batches import Calibration
from sparsify.frontend.source import Source
from sparsify.ir.program import Program
from sparsify.ir.weights import Weights
from sparsify.journal.journal import Asked, Journal, Kept, look
from sparsify.method.spec import spec_text
from sparsify.provenance.history import digest_of_store, origin_of, versions
from sparsify.tensors import digest, new_hash
from sparsify.world.world import ALONE, World


def asked_of(request: Request, context: Context, opening: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything is read. Neither where activations lie nor what the result is written as decides
    its numbers.

    Args:
        opening: words by which the model is opened and that decide what is read.
    """
    passes = []
    for own, named in zip(request.passes, request.named_by_passes, strict=True):
        own_names = [f"{word} {','.join(of)}" for word, of in (("only", named.only), ("ignore", named.ignore)) if of]
        passes.append(" ".join([spec_text(own), *own_names]))
    names = {"passes": passes, "only": list(request.only), "ignore": list(request.ignore)}
    return {**names, **settings_of(request.schedule, context, opening)}


def settings_of(schedule: str, context: Context, opening: Mapping[str, Any]) -> dict[str, Any]:
    """What else decides numbers, whatever the passes; see :func:`asked_of`."""
    return {
        "schedule": schedule,
        "seed": context.seed,
        "device": context.device.type,
        **{word: None if value is None else str(value).removeprefix("torch.") for word, value in opening.items()},
        **{f"version of {name}": number for name, number in versions().items()},
    }


def look_first(request: Request, asked: Asked) -> None:
    """A look at what interrupted runs to the same output left, before anything is read; see :func:`look`."""
    if request.out is not None and not request.dry_run:
        look(request.out, asked, _typed(request) if request.journal else None, resume=request.resume)


def open_journal(
    source: Source,
    runs: Sequence[PassRun],
    data: Calibration | None,
    dense: Program | None,
    request: Request,
    asked: Asked,
    world: World = ALONE,
) -> Journal | None:
    """The journal of this job; None where it keeps none.

    Args:
        source: the model as it was opened. runs: passes that are planned. dense: the model that passes fit to, where
            it is another. world: of its processes the first keeps a journal, and how many they are decides numbers.

    Raises:
        CheckpointError, BackendError: as :class:`Journal`.
    """
    if request.out is None or not request.journal or not request.passes or not world.leads:
        return None
    whole = {
        **asked,
        **({"processes": world.size} if world.divided else {}),
        **model_of(source),
        "calibration data": None if data is None else data.digest,
        "teacher": None if dense is None else digest_of_store(dense.weights.store),
    }
    weights = source.weights
    sizes = (
        math.prod(weights.shape(t.parameter)) * weights.dtype(t.parameter).itemsize for r in runs for t in r.targets
    )
    return Journal(request.out, whole, typed=_typed(request), resume=request.resume, need=sum(sizes))


def model_of(source: Source) -> dict[str, str]:
    """Which model it is; reads all of its weights, where nobody has yet."""
    return {
        "weights of the model": origin_of(source)["weights"],
        "config of the model": config_of(source),
    }


def config_of(source: Source) -> str:
    """A digest of what its config says of a model, and not of where it lies."""
    return _digest(source.module if source.config is None else _settings(source.config))


def apply_whole(
    own: GraphPass, program: Program, batches: Sequence[Mapping[str, Tensor]] | None, context: Context, kept: Kept
) -> None:
    """Run a pass that sees the program as a whole, unless one before has finished: what it wrote is written again.

    Several processes run it each for itself, for what it edits is each one's own, and go on with what the first wrote.
    """
    weights, done = program.weights, kept.find(_WHOLE)
    if done is not None:
        for name in done.row["written"]:
            if (found := kept.find(name)) is not None:
                weights.write(name, found.read(name))
        return
    own.apply(program, batches, context)
    _as_the_first(weights, context.world)
    written = sorted(weights.written)
    for name in written:
        kept.add(name, {}, {name: weights.read(name)})
    kept.add(_WHOLE, {"written": written}, {})


def _as_the_first(weights: Weights, world: World) -> None:
    """What was written is in all processes what the first one wrote; one that draws may have drawn otherwise."""
    if not world.divided:
        return
    first, *others = world.told({name: digest(weights.read(name)) for name in sorted(weights.written)})
    for name in sorted({name for told in (first, *others) for name in told}):
        if any(told.get(name) != first.get(name) for told in others):
            weights.write(name, world.given(weights.read(name).clone(), 0))


# No parameter's name.
_WHOLE = ""


def _typed(request: Request) -> Mapping[str, Any] | None:
    """The words of the command, as they read in a file; None where some are in memory alone."""
    found: Any = json.loads(json.dumps(request.recipe))
    return None if found is None else {**found, "to": None}


def _settings(config: Any) -> str:
    """What a model's config says of it, and not where it lies."""
    told = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    return json.dumps(told, skipkeys=True, default=str)


def _digest(told: object) -> str:
    whole = new_hash()
    whole.update(str(told).encode("utf-8", "surrogatepass"))
    return whole.hexdigest()
