"""A compile by several processes: what they can share, and whether all were asked the same."""

from __future__ import annotations

from typing import Any

from sparsify.compiler.keeping.job import config_of
from sparsify.compiler.request import Request
from sparsify.data.batches import Calibration
from sparsify.errors import ProcessError, SpecError
from sparsify.frontend.source import Source
from sparsify.journal.journal import Asked
from sparsify.method.channel_pass import ChannelPass
from sparsify.method.region_pass import RegionPass
from sparsify.method.structural_pass import StructuralPass
from sparsify.method.weight_pass import MatrixPass
from sparsify.provenance.history import versions
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
        ProcessError: a pass over the whole graph, or one that trains on fewer sequences at once than processes.
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
        if not isinstance(own, (MatrixPass, ChannelPass, RegionPass, StructuralPass)):
            raise ProcessError(
                f"pass {own.name} by {world.size} processes",
                found=f"a pass over {own.kind}, which one process runs",
                do="Run it in one process; all others are shared",
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
        world.share(data.batches, "calibration batches")


def told_of(world: World) -> dict[str, Any]:
    """What the manifest says of several processes; all of them call this."""
    return {"processes": {"count": world.size, "bytes": sum(world.told(world.sent))}} if world.divided else {}
