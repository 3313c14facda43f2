"""This process's memory: how much it has used at most, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> bool:
    """Begin a new peak for :func:`recent_peak`; False where that cannot be done (on CPUs only Linux can)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def recent_peak(device: torch.device) -> int | None:
    """Peak memory in bytes since :func:`reset_peak`: resident, or allocated on a GPU; None where nothing says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def release_freed() -> None:
    """Hand freed memory back to the system where the C library would keep it.

    glibc keeps the small objects of a dropped graph on its heap. Not for a hot path: what is given back has to be
    asked for again, page by page: after every region it slowed a whole run visibly. Does nothing elsewhere.
    """
    _trimmer()()


@functools.cache
def _trimmer() -> Callable[[], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda: None
    return lambda: trim(0)
