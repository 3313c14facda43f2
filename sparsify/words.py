"""Words that are understood without torch: amounts of memory, schedules. A wrong one is refused at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from sparsify.errors import SpecError

Word = TypeVar("Word", bound=str)
Schedule = Literal["layer", "block", "dense"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
ComputeDtype = Literal["float32", "bfloat16", "float16"]
# What the weights of a quantized model are read and written in, where nothing else is asked for.
WEIGHT_DTYPE: ComputeDtype = "bfloat16"
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)
AdapterWord = Literal["merge"]
ADAPTERS: tuple[AdapterWord, ...] = get_args(AdapterWord)

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


def check_compute_dtype(text: str | None) -> ComputeDtype | None:
    """``text`` as a dtype that a model computes in; None: that of its checkpoint.

    Raises:
        SpecError: it is none.
    """
    return None if text is None else one_of(text, COMPUTE_DTYPES, "compute dtype")


def check_adapter(text: str | None) -> AdapterWord | None:
    """``text`` as what becomes of an adapter that lies on a model's weights; None: it is refused.

    Raises:
        SpecError: it is nothing of the kind.
    """
    return None if text is None else one_of(text, ADAPTERS, "treatment of adapters")


def check_weight_dtype(text: str | None) -> ComputeDtype | None:
    """``text`` as a dtype that a quantized model's weights are made dense in; None: :data:`WEIGHT_DTYPE`.

    Raises:
        SpecError: it is none.
    """
    return None if text is None else one_of(text, COMPUTE_DTYPES, "dtype")


def parse_bytes(text: int | str) -> int:
    """``"8GiB"``, ``"500MB"`` or a number, in bytes.

    Raises:
        SpecError: not an amount of memory.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    text = str(text)
    digits = text.strip().rstrip("BbiIKkMmGgTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        if unit in _UNITS and 0 <= float(digits) < float("inf"):
            return int(float(digits) * _UNITS[unit])
    except (ValueError, OverflowError):
        pass
    raise SpecError(f"memory '{text}'", found="not an amount of memory", do="Write 8GiB or 500MB, say")


# Beside the C0 and C1 controls: what changes the direction of text or breaks lines, and halves of characters.
_UNSEEN = frozenset(map(chr, (*range(0x2028, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)))


def plain(text: str, keep: str = "") -> str:
    """``text`` with every control character but those in ``keep`` shown as an escape: ``\\x1b``, ``\\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _controls(c) else ascii(c)[1:-1] for c in text)


def _controls(c: str) -> bool:
    code = ord(c)
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or c in _UNSEEN


# Sequences that are drawn: of two tokens each they fill a gigabyte.
MAX_SAMPLES = 1 << 26


def check_whole(amount: object, what: str) -> None:
    """Python gives what it likes where a number is meant; None stands for a default.

    Raises:
        SpecError: no whole number; True and False are none.
    """
    if amount is not None and (isinstance(amount, bool) or not isinstance(amount, Integral)):
        raise SpecError(f"{what} {amount!r}", found=f"{type(amount).__name__}, no whole number", do="Give 8, say")


def check_amount(samples: int | None, sequence_length: int | None) -> None:
    """Raises:
    SpecError: no whole numbers, fewer than one sample, or more than a machine holds, or fewer than two tokens.
    """
    check_whole(samples, "samples")
    check_whole(sequence_length, "sequence length")
    if samples is not None and samples < 1:
        raise SpecError(f"{samples} samples", found="fewer than one", do="Give --samples 1 or more")
    if samples is not None and samples > MAX_SAMPLES:
        raise SpecError(f"{samples} samples", found=f"more than {MAX_SAMPLES}", do="Give fewer: 128 serve most models")
    if sequence_length is not None and sequence_length < 2:
        raise SpecError(f"sequence length {sequence_length}", found="fewer than two tokens", do="Give 2 or more")


def check_windows(windows: int | None, asked: str | None = None) -> None:
    """Refuse a number of windows that there cannot be.

    Args:
        asked: how they were asked for, where that is another word than theirs.

    Raises:
        SpecError: no whole number, or fewer than one.
    """
    check_whole(windows, "windows")
    if windows is not None and windows < 1:
        raise SpecError(asked or f"{windows} windows", found="fewer than one", do="Give 1 or more, or none for all")


def names_given(given: object, word: str) -> tuple[str, ...]:
    """What Python gives for ``only`` or ``ignore`` (``word``): one text or several, with commas as on the command line.

    Raises:
        SpecError: something else.
    """
    several = _several(given)
    if wrong := [name for name in several if not isinstance(name, str)]:
        found = f"{type(wrong[0]).__name__}, where names are meant"
        raise SpecError(f"{word} {given!r}", found=found, do='Give "*.mlp.*", say, or a list of such')
    return tuple(split_names(several))


def path_given(given: str | PathLike[str], what: str) -> Path:
    """What Python gives for a file or a folder; ``~`` is home.

    Raises:
        SpecError: no path.
    """
    if not isinstance(given, str | PathLike):
        raise SpecError(what, found=f"{type(given).__name__}, no path", do="Give its name, or a Path")
    return Path(given).expanduser()


def paths_given(given: str | PathLike[str] | Iterable[str | PathLike[str]], what: str) -> list[Path]:
    """What Python gives for files or folders: one or several.

    Raises:
        SpecError: something else.
    """
    return [path_given(place, what) for place in _several(given)]


def _several(given: object) -> list[Any]:
    """What is given once or in any number, as a list: a text is one."""
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


def split_names(given: Iterable[str]) -> list[str]:
    """Names and patterns of ``--only`` and ``--ignore``, repeated or with commas between.

    ``re:`` goes to the end of its word, for a regular expression may hold commas; so may the brackets of a glob.
    """
    found: list[str] = []
    for text in given:
        plainly, regular, rest = (text, "", "") if "re:" not in text else _before_expression(text)
        found += [name.strip() for name in re.split(r",(?![^\[]*\])", plainly) if name.strip()]
        found += [f"{regular}{rest}"] if regular else []
    return found


def _before_expression(text: str) -> tuple[str, str, str]:
    """What stands before the first pattern that begins with ``re:``, and that."""
    match = re.search(r"(?:^|,)\s*(re:)", text)
    return (text, "", "") if match is None else (text[: match.start()], "re:", text[match.end() :])


_MOST_THREADS = 4096


def check_seed(seed: int) -> None:
    """Raises:
    SpecError: no seed that every generator of random numbers takes.
    """
    check_whole(seed, "seed")
    if not 0 <= seed < 1 << 63:
        raise SpecError(f"seed {seed}", found="not a number from 0 to 2**63 - 1", do="Give --seed 0, say")


def check_threads(threads: int) -> None:
    """Raises:
    SpecError: fewer than none (0: as many as the library likes), or more than any machine has.
    """
    if not 0 <= threads <= _MOST_THREADS:
        raise SpecError(f"{threads} threads", found=f"not from 0 to {_MOST_THREADS}", do="Leave --threads out")


def format_bytes(count: int) -> str:
    """``count`` bytes for people: 1.50 GiB, 12 MiB, 4 KiB."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.0f} MiB" if count >= 1 << 19 or not count else f"{-(-count // 1024)} KiB"


# Names no longer than this stand in a table as they were given.
LONG_NAME = 20


def apart(names: Sequence[str]) -> list[str]:
    """``names`` as they are; where one is long, as much of the end of each path as tells them apart."""
    if all(len(name) <= LONG_NAME for name in names):
        return list(names)
    parts = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, parts))):
        short = ["/".join(own[-count:]) for own in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)
