"""Several processes of one command on this machine, started by torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from sparsify.errors import ProcessError

# Seconds in which processes end by themselves once one has failed.
_GRACE = 5


def launch(count: int, words: Sequence[str]) -> None:
    """Run ``sparsify WORDS`` in ``count`` processes that share the work, and wait until all are done.

    Each takes an equal part of this machine's cores, unless OMP_NUM_THREADS says how many.

    Raises:
        ProcessError: one ended without a word of its own: by a signal.
        SystemExit: one ended with an error, which it has told.
    """
    if count < 2:
        raise ProcessError(f"--processes {count}", found="fewer than two", do="Leave --processes out for one process")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it says of the processes is told here.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=_GRACE,
        local_addr="localhost",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "sparsify", *words)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise ProcessError(
                f"process {rank} of {count}",
                found=f"it was ended by {name}",
                do="Look at memory (SIGKILL is what a system sends that has none left); --resume goes on from there",
            ) from None
        raise SystemExit(failure.exitcode) from None
