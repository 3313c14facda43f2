"""The machine and this process: its memory and what of it is given back, its devices, its loggers, its name."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import platform
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparsify.errors import CalibrationError, SpecError, first_line


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


@contextmanager
def young_heap() -> Iterator[None]:
    """Garbage collections meanwhile search what is made meanwhile, and not all that torch and transformers brought:
    a third of the time that a small model is traced in.

    Where the caller froze objects of his own nothing is done: they could not be told from ours when these are freed.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@functools.cache
def _trimmer() -> Callable[[], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda: None
    return lambda: trim(0)


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU that are free, what torch holds in reserve among them, and all that it has; None where nothing
    says."""
    if device.type != "cuda":
        return None
    try:
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    except (RuntimeError, AssertionError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: torch's own, or one of CUDA's libraries or the CPU's allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


@contextmanager
def within_memory(asked: str, device: torch.device, do: str | None = None) -> Iterator[None]:
    """Around what may need more memory than there is; where one such stands in another the inner one is heard.

    Args:
        asked: what is being done. do: what helps, where that is another thing than to keep less at once.

    Raises:
        CalibrationError: the memory was not enough.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        wanted = re.search(r"tried to allocate (\d[\d.]* \w+)", str(error), flags=re.IGNORECASE)
        parts = [f"{wanted[1]} asked for"] if wanted else []
        if (memory := free_memory(device)) is not None:
            parts.append(" of ".join(f"{count / (1 << 30):.2f} GiB" for count in memory) + " free")
        ways = ["less --memory for activations", "shorter sequences (--sequence-length)"]
        last = ways.pop() if device.type == "cpu" else "--device cpu"
        raise CalibrationError(
            f"{asked} on {device}",
            found=f"out of memory ({', '.join(parts) or first_line(error)})",
            do=do or f"Take {', '.join(ways)} or {last}",
        ) from error


def resolve_device(text: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        SpecError: no such device here, or one that cannot compute.
    """
    if not isinstance(text, str):
        raise SpecError(f"device {text!r}", found=f"{type(text).__name__}, no name", do="Use auto, cpu, cuda:0, say")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    try:
        device = torch.device(text if text != "auto" else "cuda" if gpus else "cpu")
        # A GPU that this torch has no kernels for, or whose memory is full, shows at the first sum.
        float(torch.ones(2, device=device).sum())
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"device '{text}'",
            found=f"none that works on this machine ({first_line(error)})",
            do=f"Use {', '.join(['auto', 'cpu', *gpus])}",
        ) from error
    return device


# Not data: what is shared is torch's.
_ALONE = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """One thread of this process at a time: torch traces, and transformers builds models, with modes, hooks and
    default dtypes that are the whole process's.
    """
    with _ALONE:
        yield


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """What is made without naming a device lies on the CPU meanwhile, whatever ``torch.set_default_device`` said."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Silence what torch, transformers and the loggers ``more`` say meanwhile; errors still surface as exceptions.

    One thread at a time, like :func:`alone`: loggers are the whole process's too.
    """
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "transformers", "torch.fx", "torch._subclasses", *more)
    ]
    with alone():
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
