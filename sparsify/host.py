"""The machine and this process: its memory and what of it is given back, its devices, its loggers, its name."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparsify.errors import SpecError


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


def resolve_device(text: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        SpecError: no such device here.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"device '{text}'", found="no such device on this machine", do="Use auto or cpu") from error
    return device


@contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Silence what torch, transformers and the loggers ``more`` say meanwhile; errors still surface as exceptions."""
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "transformers", "torch.fx", "torch._subclasses", *more)
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        # What they log as an error comes as an exception too.
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def processor() -> str:
    """The processor's name, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
