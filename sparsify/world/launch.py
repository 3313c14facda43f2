"""Several processes of one command on this machine, started by torch."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence

from sparsify.errors import ProcessError

# Seconds in which processes end by themselves once one has failed, and again once they were told to.
_GRACE = 4
_HERE = "127.0.0.1"
# So many may be tried on a machine with fewer cores.
_FEW = 8


def launch(count: int, words: Sequence[str], main: Callable[[], None], modules: Sequence[str] = ()) -> None:
    """Run ``sparsify WORDS`` in ``count`` processes that share the work, and wait until all are done.

    Each takes an equal part of this machine's cores, unless OMP_NUM_THREADS says how many. Where torch knows no GPU
    they are copies of this process, made once it has imported ``modules``: that takes seconds, which are then spent
    once and not by each. A driver that was looked at does not live through that, nor do threads that multiply: where
    torch knows a GPU, or was imported before, each begins anew.

    Args:
        main: what runs the words of ``sys.argv`` in such a copy. modules: what they will need.

    Raises:
        ProcessError: far more than there are cores; or one ended without a word of its own: by a signal.
        SystemExit: one ended with an error, which it has told.
    """
    if count < 2:
        raise ProcessError(f"--processes {count}", found="fewer than two", do="Leave --processes out for one process")
    cores = len(os.sched_getaffinity(0))
    if count > max(cores, _FEW):
        raise ProcessError(
            f"--processes {count}",
            found=f"{cores} cores on this machine, and each process takes one and some 300 MB before it begins",
            do=f"Give at most {cores}; torchrun starts them on several machines",
        )
    # Read once, when torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    fresh = "torch" not in sys.modules
    import torch

    if fresh and not (torch.backends.cuda.is_built() or torch.version.hip):
        for name in modules:
            importlib.import_module(name)
        _copy(count, words, main)
    else:
        _begin_anew(count, words)


def _copy(count: int, words: Sequence[str], main: Callable[[], None]) -> None:
    import torch.multiprocessing as multiprocessing
    from torch.distributed import TCPStore

    # What it says of the processes is told here.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    # Theirs to meet at, as torchrun has one.
    store = TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)
    told = {
        "MASTER_ADDR": _HERE,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    # What is there stays, in pages that all of them share.
    gc.freeze()
    before = multiprocessing.active_children()
    try:
        begun = multiprocessing.start_processes(
            _run, (told, words, main), nprocs=count, join=False, start_method="fork"
        )
        while not begun.join(grace_period=_GRACE):
            pass
    except multiprocessing.ProcessExitedException as error:
        _end(error.error_index, count, error.exit_code)
    except OSError as error:
        raise ProcessError(
            f"--processes {count}",
            found=f"not all could be started ({error.strerror})",
            do="Give fewer, or look at what this account may have (ulimit -n, ulimit -u) and at memory",
        ) from error
    finally:
        # All that there are, for where one could not be started nobody was given the others.
        ours = [one for one in multiprocessing.active_children() if one not in before]
        for one in ours:  # this process was told to end
            one.terminate()
        for one in ours:
            one.join(_GRACE)
            if one.is_alive():
                one.kill()
        gc.unfreeze()


def _run(rank: int, told: dict[str, str], words: Sequence[str], main: Callable[[], None]) -> None:
    """One of the processes, from where it began."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(told, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv[1:] = words
    try:
        main()
    except Exception:  # with --debug; told by the process itself, as where it begins anew
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None


def _begin_anew(count: int, words: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
        _end(rank, count, failure.exitcode)


def _end(rank: int, count: int, code: int) -> None:
    """As process ``rank`` did, by its exit code; below zero it is a signal."""
    if code < 0:
        raise ProcessError(
            f"process {rank} of {count}",
            found=f"it was ended by {signal.Signals(-code).name}",
            do="Look at memory (SIGKILL is what a system sends that has none left); --resume goes on from there",
        ) from None
    raise SystemExit(code) from None
