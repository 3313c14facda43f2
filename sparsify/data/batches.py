"""Calibration and evaluation data as batches that a program can run: from a source's name, or from Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.examples import decoder_from_labels, other_inputs
from sparsify.data.generate import sample_from_model
from sparsify.data.images import read_images
from sparsify.data.rows import Refusing
from sparsify.data.sources import FORMS, Documents, read_documents
from sparsify.data.windows import Encode, disjoint_windows, random_windows
from sparsify.errors import CalibrationError, SparsifyError, SpecError
from sparsify.files.reading import kind_at
from sparsify.finite import said, scan
from sparsify.frontend.positions import with_positions
from sparsify.frontend.source import Source
from sparsify.words import check_amount

# Tokens that run through the graph at once: enough to keep the matrix products busy, few enough for the cache.
TOKENS_AT_ONCE = 2048
# How much is drawn where nobody says: as in the papers.
_SAMPLES, _LENGTH = 128, 2048
# From the model itself: token by token is slow; fewer, shorter sequences serve (one sample already does most:
# 2306.11695).
_SELF_SAMPLES, _SELF_LENGTH = 32, 512
# An image is some 200 patches.
_IMAGE_TOKENS = 256


@dataclass(frozen=True)
class Calibration:
    """Batches ready to run, all of one shape.

    Attributes:
        batches: input name to tensor. ``label``: where they came from, as said to the user.
        digest: sha256 of every tensor, for the manifest.
        plumbing: whether they are no data at all, and good for trying things out only.
        labels: per batch, what a loss compares the outputs with, where the data brought any.
    """

    batches: list[dict[str, Tensor]]
    label: str
    digest: str
    labels: list[Tensor] | None = None
    plumbing: bool = False

    @property
    def sequences(self) -> int:
        return count_sequences(self.batches)

    @property
    def size(self) -> str:
        """How much there is, in words."""
        text = next(iter(self.batches[0].values())).dim() == 2
        return f"{self.sequences} × {self.sequence_length} tokens" if text else f"{self.sequences} samples"

    @property
    def sequence_length(self) -> int:
        first = next(iter(self.batches[0].values()))
        return first.shape[1] if first.dim() == 2 else 1


def count_sequences(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Rows of all batches: sequences of text, images, samples."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def load_calibration(
    data: str | Iterable[Any] | Calibration | None,
    source: Source,
    *,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    one_by_one: bool = False,
) -> Calibration:
    """Batches from ``data``: a source's name, an iterable of batches, or None for C4 and, without it, ``self``.

    Args:
        one_by_one: batches of one sample each, as gradients per sample need them.

    Raises:
        CalibrationError: nothing there, too short, ids past the vocabulary, or batches of different kinds.
    """
    if isinstance(data, Calibration):
        return data
    check_amount(samples, sequence_length)
    if data is None or isinstance(data, str):
        check_length(sequence_length, source)
    if data is not None and not isinstance(data, str):
        batches, label = _from_python(data, source, samples), "batches given in Python"
    elif data is not None and _names_images(data, source):
        images = read_images(Path(data), source, samples or _SAMPLES, seed)
        rows = {"pixel_values": images.pixels} | ({} if images.labels is None else {"labels": images.labels})
        batches, label = _rows_to_batches(rows, whole=False), images.note
    else:
        ids, label = _from_name(data, source, samples, sequence_length, seed)
        batches = _rows_to_batches(as_inputs(ids, source), whole=True)
    if one_by_one:
        batches = _split(batches)
    if source.compute is not None:
        batches = [{n: t.to(source.compute) if t.is_floating_point() else t for n, t in b.items()} for b in batches]
    batches = [with_positions(source.module, batch) for batch in batches]
    _check_inputs(batches, source)
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(batch[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    labels = [batch.pop("labels") for batch in batches] if "labels" in batches[0] else None
    return Calibration(batches, label, digest.hexdigest(), labels, plumbing=data == "random")


def check_length(length: int | None, source: Source) -> None:
    """Raises:
    SpecError: sequences of fewer than two tokens, or of more than the model has positions for.
    """
    check_amount(None, length)
    most = source.context_length
    if length is not None and most is not None and length > most:
        raise SpecError(
            f"sequence length {length}",
            found=f"the context of {source.name} is {most} tokens (config.json)",
            do=f"Give at most {most}",
        )


def expected_batch(
    data: str | None,
    source: Source,
    *,
    samples: int | None = None,
    sequence_length: int | None = None,
    one_by_one: bool = False,
) -> dict[str, Tensor]:
    """A batch with nothing in it, of the shape that :func:`load_calibration` will give of a named source.

    A model is traced by it before anything is drawn, which may take minutes. A source that turns out otherwise (fewer
    images, C4 that is not to be had) costs another trace.

    Raises:
        CalibrationError: the model's inputs cannot be guessed from its config.
    """
    if data is not None and _names_images(data, source):
        rows = 1 if one_by_one else _rows_at_once(samples or _SAMPLES, _IMAGE_TOKENS)
        return example_batch(source, rows)
    check_length(sequence_length, source)
    own = data == "self"
    length = sequence_length or default_length(source, _SELF_LENGTH if own else _LENGTH)
    rows = 1 if one_by_one else _rows_at_once(samples or (_SELF_SAMPLES if own else _SAMPLES), length)
    return example_batch(source, rows, length)


def _names_images(data: str, source: Source) -> bool:
    return getattr(source.module, "main_input_name", None) == "pixel_values" and kind_at(data) == "folder"


def evaluation_windows(data: str, source: Source, length: int | None, limit: int | None) -> tuple[Tensor, str]:
    """Disjoint windows of held-out text, [windows, length] int32, and where they are from."""
    check_length(length, source)
    documents = read_documents(data, "heldout")
    with Refusing(data):
        windows = disjoint_windows(documents, _encoder(source), length or default_length(source), limit)
    return windows, documents.label


def default_length(source: Source, most: int = _LENGTH) -> int:
    return min(most, source.context_length or most)


def example_batch(source: Source, rows: int = 1, length: int = 16) -> dict[str, Tensor]:
    """Inputs of the right names, shapes and dtypes with nothing in them, to trace a model by.

    Raises:
        CalibrationError: the model's inputs cannot be guessed from its config.
    """
    name, others = getattr(source.module, "main_input_name", None), other_inputs(source, rows)
    if name == "input_ids":
        ids = torch.zeros(rows, min(length, default_length(source, length)), dtype=torch.long)
        return as_inputs(ids, source) | others
    if others:
        return others
    raise CalibrationError(
        f"inputs for {type(source.module).__name__}",
        found="a module whose inputs are unknown" if name is None else f"its main input is {name!r}",
        do="Give batches to sparsify.compile in Python (tensors, tuples or keyword dictionaries); they tell the shapes",
    )


def as_inputs(ids: Tensor, source: Source) -> dict[str, Tensor]:
    """Token ids as the keyword inputs of the model; a decoder beside an encoder reads the same text."""
    inputs = {"input_ids": ids}
    if getattr(source.config, "is_encoder_decoder", False):
        start = getattr(source.config, "decoder_start_token_id", None) or 0
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return inputs


def _from_name(
    data: str | None, source: Source, samples: int | None, length: int | None, seed: int
) -> tuple[Tensor, str]:
    name = getattr(source.module, "main_input_name", None)
    others = other_inputs(source)
    if source.is_transformers and (name != "input_ids" or others):
        raise CalibrationError(
            f"calibration '{data or 'c4'}' for {type(source.module).__name__}",
            found=f"the model reads {' and '.join(dict.fromkeys([str(name), *others]))}, not text"
            + (" alone" if name == "input_ids" else ""),
            do="Name a folder of images"
            if name == "pixel_values"
            else "Give batches as keyword dictionaries in Python",
        )
    if not source.is_transformers:
        raise CalibrationError(
            f"calibration '{data or 'c4'}' for {type(source.module).__name__}",
            found="a module that is no transformers model, so its inputs are unknown",
            do="Give batches: tensors, tuples or keyword dictionaries",
        )
    why = ""
    if data is None:
        try:
            documents = read_documents("c4", "calibration")
            return _windows(documents, source, samples or _SAMPLES, length or default_length(source), seed)
        except SparsifyError as error:
            data, why = "self", f", because C4 is not to be had: {error.found}"
    if data == "random":
        vocabulary = source.vocab_size
        if not vocabulary:
            raise CalibrationError("calibration 'random'", found="a config without vocab_size", do=f"Name {FORMS}")
        shape = (samples or _SAMPLES, length or default_length(source))
        ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
        return ids, "random token ids, which are NOT text: good for speed and plumbing, not for quality"
    if data == "self":
        ids = sample_from_model(source, samples or _SELF_SAMPLES, length or default_length(source, _SELF_LENGTH), seed)
        return ids, f"self (sampled from the model, seed {seed}{why})"
    documents = read_documents(data, "calibration")
    return _windows(documents, source, samples or _SAMPLES, length or default_length(source), seed)


def _windows(documents: Documents, source: Source, samples: int, length: int, seed: int) -> tuple[Tensor, str]:
    with Refusing(documents.label):
        return random_windows(documents, _encoder(source), samples, length, seed), documents.label


def _encoder(source: Source) -> Encode:
    def encode(text: str, special: bool = True) -> Tensor:
        # Longer than the model's context on purpose: windows are cut afterwards.
        return torch.tensor(source.tokenizer()(text, add_special_tokens=special, verbose=False)["input_ids"]).long()

    return encode


def _from_python(data: Iterable[Any], source: Source, samples: int | None) -> list[dict[str, Tensor]]:
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
    if empty := next((n for b in given for n, t in b.items() if not t.numel()), None):
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
    return _rows_to_batches(rows, whole=ids_only)


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
                if not _are_ids(ids) or ids.dim() != 2:
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
        do="Give LongTensors [batch, sequence], or dictionaries of the model's inputs",
    )


def _rows_to_batches(rows: Mapping[str, Tensor], *, whole: bool) -> list[dict[str, Tensor]]:
    """Equal batches of rows: as many at once as TOKENS_AT_ONCE allows and divides them."""
    first = next(iter(rows.values()))
    count = len(first)
    # What other inputs are worth is unknown.
    other = _IMAGE_TOKENS if "pixel_values" in rows else TOKENS_AT_ONCE
    size = _rows_at_once(count, first.shape[1] if whole and first.dim() == 2 else other)
    return [{n: t[i : i + size].contiguous() for n, t in rows.items()} for i in range(0, count, size)]


def _rows_at_once(count: int, tokens: int) -> int:
    """How many of ``count`` rows of ``tokens`` each run at once: as many as TOKENS_AT_ONCE allows and divide them."""
    most = max(1, TOKENS_AT_ONCE // tokens)
    return max(d for d in range(1, min(most, count) + 1) if count % d == 0)


def _split(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches of one row each.

    Raises:
        CalibrationError: inputs that do not share their first axis.
    """
    single = []
    for batch in batches:
        rows = {len(t) for t in batch.values()}
        if len(rows) > 1:
            raise CalibrationError(
                "gradients per sample",
                found=f"inputs whose first axes differ: {sorted(rows)}",
                do="Give batches whose inputs all have one row per sample",
            )
        single += [{n: t[i : i + 1].contiguous() for n, t in batch.items()} for i in range(rows.pop())]
    return single


def _are_ids(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _check_inputs(batches: list[dict[str, Tensor]], source: Source) -> None:
    vocabulary = source.vocab_size
    for index, batch in enumerate(batches):
        for name, tensor in batch.items():
            # Masks that are added to scores forbid by minus infinity.
            if (found := scan(tensor, mask="mask" in name)).count:
                raise CalibrationError(
                    f"batch {index} of calibration input {name}", found=said(found, tensor.shape), do="Mend the data"
                )
            if not name.endswith("input_ids"):
                continue
            if not _are_ids(tensor):
                raise CalibrationError(
                    f"batch {index} of calibration input {name}", found=f"{tensor.dtype}", do="Ids are whole numbers"
                )
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or (vocabulary and high >= vocabulary):
                raise CalibrationError(
                    f"token id {low if low < 0 else high} of calibration batch {index}",
                    found=f"the model's vocabulary has {vocabulary} tokens",
                    do="The ids are of another tokenizer; give text, or ids of this model's",
                )
