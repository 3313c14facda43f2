"""Learned tables of positions, read off the model itself: how many rows, and from which on positions begin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

from sparsify.frontend.source import Source
from sparsify.frontend.text_config import text_config

# What a table of one row per position is called in every family; tables of distances, boxes and patches are not.
_NAMES = re.compile(r"(embed_|encode_)?pos(ition(s|al)?)?(_?(embed(s|ding|dings|der|s_layer)?|emb|encoding))?|wpe")


@dataclass(frozen=True)
class Table:
    """A table of positions: the parameter or buffer ``name`` of ``rows`` rows, of which the first ``skipped`` stand for
    no position."""

    name: str
    rows: int
    skipped: int

    @property
    def tokens(self) -> int:
        """The longest sequence that it has positions for."""
        return self.rows - self.skipped

    def __str__(self) -> str:
        begin = f", the first {self.skipped} of them for no position" if self.skipped else ""
        return f"the position table {self.name} has {self.rows} rows{begin}"


def position_table(source: Source) -> Table | None:
    """The smallest table that the positions of text index; None where positions are computed (rotary, ALiBi, sines
    made as needed) or the model reads no text.

    A family that numbers its positions from behind the padding's (RoBERTa) or from an offset (OPT, BART) says so on
    the table itself: ``padding_idx``, ``offset``. A tower with a config of its own (vision beside text) has its own
    positions.
    """
    module = source.module
    if not source.is_transformers or getattr(module, "main_input_name", None) != "input_ids":
        return None
    configs = _text_configs(source.config)
    found: list[Table] = []

    def walk(owner: nn.Module, path: str, of_text: bool) -> None:
        config = getattr(owner, "config", None)
        if config is not None and hasattr(owner, "main_input_name"):
            of_text = any(config is known for known in configs)
        for name, child in owner.named_children():
            weight = getattr(child, "weight", None)
            if of_text and _NAMES.fullmatch(name) and _is_table(weight):
                found.append(Table(f"{path}{name}", len(weight), _skipped(child)))
            walk(child, f"{path}{name}.", of_text)
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if of_text and _NAMES.fullmatch(name) and _is_table(tensor) and tensor.is_floating_point():
                found.append(Table(f"{path}{name}", len(tensor), 0))

    walk(module, "", True)
    return min((table for table in found if table.tokens > 0), key=lambda table: table.tokens, default=None)


def _is_table(tensor: Any) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.dim() == 2


def _skipped(table: nn.Module) -> int:
    if isinstance(offset := getattr(table, "offset", None), int):
        return offset
    padding = getattr(table, "padding_idx", None)
    return padding + 1 if isinstance(padding, int) else 0


def _text_configs(config: Any) -> list[Any]:
    """The configs of what reads text: the model's own, and those that it names for text, encoder and decoder."""
    return [config, text_config(config), text_config(config, encoder=True), text_config(config, decoder=True)]
