"""Words that are understood without torch: amounts of memory, schedules. A wrong one is refused at once."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

from sparsify.errors import SpecError

Word = TypeVar("Word", bound=str)
Schedule = Literal["layer", "block", "dense"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

_UNITS = {
    "": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40, "KB": 10**3, "MB": 10**6,
    "GB": 10**9, "TB": 10**12,
}  # fmt: skip


def one_of(text: str, choices: tuple[Word, ...], what: str) -> Word:
    """``text`` as one of ``choices``; ``what`` is what they are called.

    Raises:
        SpecError: it is none of them.
    """
    for choice in choices:
        if text == choice:
            return choice
    raise SpecError(f"{what} '{text}'", found=f"no such {what}", do=f"Choose {', '.join(choices)}")


def check_schedule(text: str) -> Schedule:
    """``text`` as a schedule; see :mod:`sparsify.prune.engine`.

    Raises:
        SpecError: it is none.
    """
    return one_of(text, SCHEDULES, "schedule")


def parse_bytes(text: int | str) -> int:
    """``"8GiB"``, ``"500MB"`` or a number, in bytes.

    Raises:
        SpecError: not an amount of memory.
    """
    if isinstance(text, int):
        return text
    digits = text.strip().rstrip("BbiIKkMmGgTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        if unit in _UNITS and float(digits) >= 0:
            return int(float(digits) * _UNITS[unit])
    except ValueError:
        pass
    raise SpecError(f"memory '{text}'", found="not an amount of memory", do="Write 8GiB or 500MB, say")


def format_bytes(count: int) -> str:
    """``count`` bytes for people: 1.50 GiB, 12 MiB."""
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
