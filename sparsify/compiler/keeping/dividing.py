"""A compile by several processes: what they can share, and whether all were asked the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsify.compiler.keeping.job import config_of
from sparsify.compiler.request import Request
from sparsify.compiler.runs import PassRun
from sparsify.data.batches import Calibration
from sparsify.errors import ProcessError, SpecError
from sparsify.frontend.source import Source
from sparsify.journal.journal import Asked
from sparsify.method.region_pass import RegionPass
from sparsify.provenance.history import EPOCH, versions
from sparsify.tensors import new_hash
from sparsify.world.world import World


def check_world(world: object) -> None:
    """Raises:
    SpecError: no world.
    """
    if not isinstance(world, World):
        raise SpecError(
            f"world={type(world).__name__}", found="no processes", do="Give what sparsify.join() gives, or leave it out"
        )


def check_divided(request: Request, world: World) -> None:
    """Refuse what several processes do not share, before anything is opened.

    Raises:
        SpecError: no world.
        ProcessError: a pass that trains on fewer sequences at once than processes.
    """
    check_world(world)
    if not world.divided:
        return
    for own in request.passes:
        if isinstance(own, RegionPass) and own.batch < world.size:
            raise ProcessError(
                f"pass {own.name} by {world.size} processes",
                found=f"sequences of one step to share out among them: {own.batch}",
                do=f"Take {own.batch} processes or fewer, or {own.name}:batch={world.size}",
            )


def agree(source: Source, request: Request, asked: Asked, world: World) -> None:
    """Raises:
    ProcessError: another process was asked otherwise, has other versions, or sees another model.
    """
    amounts = {"samples": request.samples, "sequence length": request.length, "backend": str(request.backend)}
    calibration = {"calibration": request.named if request.is_named else "given"}
    agree_on_model(source, {**asked, **amounts, **calibration}, world)


def agree_on_model(source: Source, asked: Asked, world: World) -> None:
    """Raises:
    ProcessError: another process was asked otherwise, or sees another model.
    """
    if not world.divided:
        return
    store, names = source.weights.store, new_hash()
    for name in sorted(store.names()):
        names.update(f"{name} {tuple(store.shape(name))} {store.dtype(name)}\n".encode())
    versioned = {f"version of {name}": number for name, number in versions().items()}
    model = {"config of the model": config_of(source), "tensors of the model": names.hexdigest()}
    world.agree({**versioned, **asked, **model})


def agree_on_data(data: Calibration | None, world: World) -> None:
    """Raises:
    ProcessError: another process drew other data, or there are fewer batches than processes.
    """
    if not world.divided:
        return
    world.agree({"calibration data": None if data is None else data.digest})
    if data is not None:
        rows = max((len(next(iter(batch.values()))) for batch in data.batches), default=1)
        world.share(data.batches, "calibration batches", f"--samples: a batch is {rows} such sequences")


def told_of(world: World, runs: Sequence[PassRun], *, timed: bool) -> dict[str, Any]:
    """What the manifest says of several processes; all of them call this.

    Args:
        timed: whether all of ``runs`` was done now, so that tokens a second can be told.
    """
    if not world.divided:
        return {}
    own = Load(world.sent, round(world.worked, 3), round(world.waited, 3))
    loads = [Load(**told) for told in world.told(asdict(own))]
    said: dict[str, Any] = {"count": world.size, "bytes": sum(load.sent for load in loads)}
    if EPOCH in os.environ:
        # Whoever sets the date wants the same bytes twice.
        return {"processes": said}
    # Of a mixture, the sites that all tokens reach.
    tokens = [(max(site.tokens for site in run.sites), run.seconds) for run in runs if run.sites]
    seen, seconds = sum(count for count, _ in tokens), sum(taken for count, taken in tokens if count)
    if timed and seen:
        said["tokens_per_second"] = round(seen / seconds, 1)
    return {"processes": {**said, "ranks": [asdict(load) for load in loads]}}


@dataclass(frozen=True)
class Load:
    """Of one process: bytes that it sent, and seconds that it worked, and waited for others."""

    sent: int
    worked: float
    waited: float
