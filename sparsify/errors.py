"""Every way in which sparsify refuses, as a small closed set of types.

Each error says three things: what was asked, what was found, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class SparsifyError(Exception):
    """Base of every error that sparsify raises on purpose.

    ``exit_code`` is what the command line ends with: 2 where the words of the command are wrong, 1 where
    the world (a file, a model, the data) is.
    """

    exit_code = 1

    def __init__(self, asked: str, *, found: str, do: str) -> None:
        self.asked, self.found, self.do = asked, found, do
        super().__init__(f"{asked}: {found}. {do}")

    def asking(self, asked: str) -> SparsifyError:
        """The same refusal of what its caller knows to have been ``asked``: a site or a pass named, say."""
        return type(self)(asked, found=self.found, do=self.do)


class SpecError(SparsifyError):
    """A pass, an option or a name pattern that cannot be meant."""

    exit_code = 2


class PatternError(SpecError):
    """A sparsity pattern that does not exist, or scores that it cannot be applied to."""


class CheckpointError(SparsifyError):
    """A model folder that is missing, broken, or disagrees with its own config."""


class TraceError(SparsifyError):
    """A model that cannot be captured as a graph."""


class CalibrationError(SparsifyError):
    """Calibration data, or the statistics computed from it, that cannot be used."""


class BackendError(SparsifyError):
    """An output that cannot be written."""


class ProcessError(SparsifyError):
    """Processes of one job that cannot work together, or of which one has failed."""


class VerifyError(SparsifyError):
    """A result that breaks its own promise: a bug in a pass, never the user's fault."""


@dataclass(frozen=True)
class Refused:
    """Something that was looked at and left as it is: no error, and never passed over in silence.

    Attributes:
        reason: why, for people; no decision reads it.
        node: what: the name of a node, a site or a weight.
        code: for programs, where they must tell one reason from the others.
    """

    reason: str
    node: str = ""
    code: str = ""


def near(word: str, known: Iterable[str], limit: int = 4) -> str:
    """Say which of ``known`` look like ``word``, as a sentence for an error's ``do``."""
    names = sorted(known)
    if not names:
        return "There are none"
    close = difflib.get_close_matches(word, names, n=limit, cutoff=0.5)
    return "Near names: " + ", ".join(close or difflib.get_close_matches(word, names, n=limit, cutoff=0.0))


def first_line(error: BaseException) -> str:
    """The first line of another library's error that says something, else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # What is printed over many lines (a module) says nothing in the first of them.
    return f"{lines[0]}…{lines[-1]}" if len(lines) > 1 and lines[0].endswith(("(", "[", "{")) else lines[0]
