"""Where in a model's own code something happened, for people: a file, a line and what it says."""

from __future__ import annotations

import linecache
import sys
import sysconfig
import traceback
from pathlib import Path

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sparsify.errors import first_line

# What calls a model's code, and what it calls: nobody looks for a model there.
_NOT = (str(Path(__file__).parents[2]) + "/", str(Path(torch.__file__).parent) + "/", "<")
# What torch 2.13 says where numbers are read past its own questions.
_NO_NUMBERS = ("data is not allocated yet", "expected to contain only concrete integers")
_LIBRARY = sysconfig.get_paths()["stdlib"] + "/"


def model_line() -> str:
    """The line of a model's code that is running: the nearest that is neither torch's nor this project's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not _is_model(frame.f_code.co_filename):
        frame = frame.f_back
    return _said(frame.f_code.co_filename, frame.f_lineno)


def failed_line(error: BaseException) -> str:
    """The line of a model's code at which ``error`` was raised; empty where none was running."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_model(frame.f_code.co_filename):
            found = _said(frame.f_code.co_filename, line)
    return found


def asks_numbers(error: BaseException) -> bool:
    """Whether an export failed because a model's Python asked for numbers that a trace has not."""
    return isinstance(error, GuardOnDataDependentSymNode) or any(text in str(error) for text in _NO_NUMBERS)


def reason_of(error: BaseException) -> str:
    """Why a trace of a model failed, and at which line of the model's code."""
    where = failed_line(error)
    if asks_numbers(error):
        return f"the model chooses a way or a size{f' at {where}' if where else ''} by numbers that only a run can give"
    return f"{first_line(error)}{f' at {where}' if where else ''}"


def _is_model(file: str) -> bool:
    return not file.startswith(_NOT) and (not file.startswith(_LIBRARY) or "site-packages" in file)


def _said(file: str, line: int) -> str:
    return f"{Path(file).name}:{line} ({linecache.getline(file, line).strip()})"
