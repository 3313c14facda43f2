"""Batches given in Python: tensors, tuples of them, or keyword dictionaries of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparsify.data.examples import decoder_from_labels
from sparsify.data.inputs import are_ids, as_inputs, rows_to_batches
from sparsify.data.parts import Documents
from sparsify.data.rows import document
from sparsify.errors import CalibrationError
from sparsify.frontend.source import Source


def named_or_given(data: str | Path | Iterable[Any] | None) -> str | Iterable[Any] | None:
    """What a user gives as data: a source's name as text, batches, or a list of texts; what can be read but once is
    read now."""
    if isinstance(data, Path):
        return str(data)
    if isinstance(data, Iterator):
        return list(data)
    return data


def are_texts(data: Any) -> TypeGuard[Sequence[str]]:
    """Whether data given in Python are texts, and no batches."""
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(item, str) for item in data)


def given_texts(texts: Sequence[str]) -> Documents:
    """Texts given in Python as documents.

    Raises:
        CalibrationError: nothing in any, or a NUL in one.
    """
    documents = [document(text, f"text {number}") for number, text in enumerate(texts) if text.strip()]
    if not documents:
        raise CalibrationError(f"{len(texts)} texts", found="nothing in them", do="Give some text")
    return Documents(f"{len(texts)} texts given in Python" if len(texts) > 1 else "a text given in Python", documents)


def given_batches(data: Iterable[Any], source: Source, samples: int | None) -> list[dict[str, Tensor]]:
    if isinstance(data, (Tensor, Mapping)):
        data = [data]
    try:
        given = [_named(item, source) for item in data]
    except TypeError as error:
        raise CalibrationError(
            f"calibration of type {type(data).__name__}",
            found="not an iterable of batches",
            do="Give a list of tensors",
        ) from error
    if not given:
        raise CalibrationError("calibration", found="no batches", do="Give at least one batch")
    # A series without features beside it is [batch, time, 0].
    if empty := next((n for b in given for n, t in b.items() if 0 in t.shape[:2]), None):
        raise CalibrationError(f"calibration input {empty}", found="an empty tensor", do="Give some tokens")
    if other := next((batch for batch in given if batch.keys() != given[0].keys()), None):
        raise CalibrationError(
            "calibration batches",
            found=f"inputs {sorted(given[0])} in one and {sorted(other)} in another",
            do="Give every batch the same inputs",
        )
    shapes = {name: {tuple(b[name].shape[1:]) for b in given} for name in given[0]}
    if uneven := next((n for n, s in shapes.items() if len(s) > 1), None):
        raise CalibrationError(
            f"calibration input {uneven}",
            found=f"shapes {sorted({tuple(b[uneven].shape) for b in given})[:4]}",
            do="One graph is traced for one shape: pad to one length (with an attention_mask) or group by length",
        )
    # Ids in a bare tensor are [batch, sequence]; what other inputs hold in their first axis only the user knows.
    ids_only = given[0].keys() == {"input_ids"}
    even = len({tuple(t.shape for t in b.values()) for b in given}) == 1
    if not ids_only and even:
        return given if samples is None else given[:samples]
    rows = {name: torch.cat([batch[name] for batch in given]) for name in given[0]}
    if len({len(t) for t in rows.values()}) > 1:
        raise CalibrationError(
            "calibration batches",
            found="batches of different sizes with inputs that do not share their first axis",
            do="Give batches of equal size",
        )
    if samples is not None:
        rows = {name: tensor[:samples] for name, tensor in rows.items()}
    return rows_to_batches(rows, whole=ids_only)


def _named(item: Any, source: Source) -> dict[str, Tensor]:
    values = item.values() if isinstance(item, Mapping) else item if isinstance(item, (tuple, list)) else [item]
    if any(isinstance(value, Tensor) and value.is_meta for value in values):
        raise CalibrationError(
            "a calibration batch", found="tensors on the meta device, which hold nothing", do="Give data"
        )
    if isinstance(item, Tensor):
        if source.is_transformers:
            name = getattr(source.module, "main_input_name", "input_ids")
            if name == "input_ids":
                ids = item[None] if item.dim() == 1 else item
                if not are_ids(ids) or ids.dim() != 2:
                    raise CalibrationError(
                        f"a batch of {item.dtype} {tuple(item.shape)}",
                        found="token ids are whole numbers [batch, sequence]",
                        do="Give a LongTensor, or a keyword dictionary",
                    )
                return as_inputs(ids.long().cpu(), source)
            return {name: item.cpu()}
        return {"0": item.cpu()}
    if isinstance(item, Mapping):
        named = {k: v.cpu() for k, v in item.items() if isinstance(v, Tensor)}
        text = as_inputs(named["input_ids"], source) if "input_ids" in named else {}
        return text | named | decoder_from_labels(named, source)
    if isinstance(item, (tuple, list)) and all(isinstance(v, Tensor) for v in item):
        return {str(i): v.cpu() for i, v in enumerate(item)}
    raise CalibrationError(
        f"a batch of type {type(item).__name__}",
        found="not a tensor, a tuple of tensors or a keyword dictionary",
        do="Give LongTensors [batch, sequence], dictionaries of the model's inputs, or nothing but texts",
    )
