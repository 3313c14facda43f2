"""Joining the other processes of a job: what ``torchrun`` says of them stands in the environment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from sparsify.errors import ProcessError, first_line
from sparsify.world.world import ALONE, World

if TYPE_CHECKING:
    import torch

# Seconds without a sign of life after which a process counts as hung, unless SPARSIFY_PATIENCE says otherwise.
_PATIENCE = 8.0
# How long to wait for the others to be there at all.
_JOINING = timedelta(seconds=120)
# What stands in the environment of a process that torchrun started.
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def size_told(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes this is one of, by what ``torchrun`` says; 1 where nobody started several.

    Raises:
        ProcessError: it says it in part, or no number.
    """
    if "WORLD_SIZE" not in environment:
        return 1
    missing = [name for name in _TOLD if name not in environment]
    numbers = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if missing or not all(number.isdecimal() for number in numbers) or not int(numbers[0]) < int(numbers[1]):
        said = ", ".join(f"{name}={environment.get(name, '')}" for name in _TOLD)
        raise ProcessError(
            "several processes",
            found=f"an environment that does not say which of them this is ({said})",
            do="Start them with torchrun, or unset WORLD_SIZE for one process",
        )
    return int(numbers[1])


def leads_told(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first process of those that ``torchrun`` tells of, or the only one; see :func:`size_told`."""
    return size_told(environment) == 1 or int(environment["RANK"]) == 0


@contextmanager
def join(device: str | torch.device = "cpu") -> Iterator[World]:
    """The world of this process meanwhile: that of ``torchrun``, or this process alone.

    Args:
        device: ``"cpu"``, where processes speak by gloo, or ``"cuda"``, by NCCL, one GPU each (``LOCAL_RANK``).

    Raises:
        ProcessError: the others cannot be reached, or the environment is no whole.

    >>> import sparsify
    >>> with sparsify.join() as world:
    ...     print(world.rank, "of", world.size)
    0 of 1
    """
    if size_told() == 1:
        yield ALONE
        return
    patience = _patience()
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from sparsify.world.processes import Processes
    from sparsify.world.watch import Watch

    if dist.is_initialized():
        raise ProcessError(
            "joining other processes",
            found="torch.distributed is set up already in this process",
            do="Join before anything else does, or run sparsify in a process of its own",
        )
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    try:
        store, rank, size = next(rendezvous("env://", timeout=_JOINING))
        # All of them, before what waits for a week.
        there = dist.PrefixStore("there", store)
        there.set(str(rank), "1")
        there.wait([str(number) for number in range(size)], _JOINING)
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=dist.PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            # Waiting is watched from outside: a process may prune alone for longer than any limit of torch's.
            timeout=timedelta(days=7),
        )
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_JOINING
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise ProcessError(
            "joining other processes",
            found=f"they cannot be reached ({first_line(error)})",
            do="Look at MASTER_ADDR, at the network between the machines (GLOO_SOCKET_IFNAME names an interface), and "
            "whether all processes were started",
        ) from error
    watch = Watch(dist.PrefixStore("watch", own), rank, size, patience)
    world = Processes(rank, size, where, watch)
    try:
        world.told("here")
        watch.start()
        yield world
    except BaseException as error:
        watch.stop(failed=str(error) or type(error).__name__)
        raise
    else:
        watch.stop()
    finally:
        # Not in order where a process failed: the others may be gone.
        dist.destroy_process_group()


def _patience() -> float:
    text = os.environ.get("SPARSIFY_PATIENCE", str(_PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 3 <= seconds < math.inf:
        raise ProcessError(
            f"SPARSIFY_PATIENCE={text}", found="no number of seconds from 3 on", do="Give 8, the default, or more"
        )
    return seconds
