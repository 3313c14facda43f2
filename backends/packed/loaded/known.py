"""What was measured on this machine, by this version of the kernels and of torch, and is kept in the cache folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import SpecError
from sparsify.host import processor
from sparsify.runtime.cache import cache_folder, put_whole, read_object
from sparsify.runtime.cpu import native
from sparsify.runtime.cpu.build import source_hash
from sparsify.runtime.layout import Packed


def this_machine() -> dict[str, str]:
    """What a choice that is measured here holds for, as ``measured`` of ``quantization_config`` says it."""
    return {"processor": processor(), "instructions": native.ISAS[native.isa()]}


def key_of(packed: Packed, *, exact: bool) -> str:
    """What a product with ``packed`` is known by: all of it that decides how long one takes.

    Args:
        exact: of few bits: inputs are not rounded to 8 bits.
    """
    rows, columns = packed.shape
    few = "" if packed.bits is None else f" int{packed.bits} {packed.group} {exact}"
    tenths = round(10 * packed.values.numel() / max(1, rows * columns))
    return f"{rows}x{columns} {str(packed.dtype).removeprefix('torch.')} {packed.layout}{few} {tenths}"


class Known:
    """What was measured, by keys; of another machine, other kernels or another torch nothing is.

    Args:
        file: its name in the cache folder. field: what the file calls it. sound: whether that can have been measured;
            what cannot is measured again. of: what else it holds for.
    """

    def __init__(self, file: str, field: str, sound: Callable[[Any], bool], **of: str) -> None:
        self._field, self._new = field, False
        self._path: Path | None = None
        self._of = {**this_machine(), "kernels": source_hash(), "torch": torch.__version__, **of}
        self._found: dict[str, Any] = {}
        with contextlib.suppress(SpecError):  # a user without a home: measured in every process
            self._path = cache_folder() / file
        kept = {} if self._path is None else read_object(self._path)
        if kept.get("of") == self._of and isinstance(kept.get(field), dict):
            self._found = {key: found for key, found in kept[field].items() if sound(found)}

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self._found:
            self._found[key], self._new = measure(), True
        return self._found[key]

    def keep(self) -> None:
        """Write what is new to the cache folder."""
        if self._new and self._path is not None:
            put_whole(self._path, json.dumps({"of": self._of, self._field: self._found}).encode())
            self._new = False
