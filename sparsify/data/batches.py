"""Calibration and evaluation data as batches that a program can run: from a source's name, or from Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.chat import Chat
from sparsify.data.examples import other_inputs
from sparsify.data.generate import sample_from_model, writes_text
from sparsify.data.given import are_texts, given_batches, given_texts, named_or_given
from sparsify.data.inputs import (
    IMAGE_TOKENS,
    USUAL,
    are_ids,
    as_inputs,
    check_length,
    check_table,
    default_length,
    fewer_rows,
    one_row_alone,
    outside,
    rows_at_once,
    rows_to_batches,
    split_rows,
    warn_of_length,
)
from sparsify.data.parts import Documents
from sparsify.data.pictures.image_text import names_image_text, read_image_text
from sparsify.data.pictures.images import read_images
from sparsify.data.rows import Refusing
from sparsify.data.sources import FORMS, read_documents
from sparsify.data.windows import Encode, disjoint_windows, random_windows
from sparsify.errors import CalibrationError, SparsifyError
from sparsify.files.reading import kind_at
from sparsify.finite import said, scan
from sparsify.frontend.source import Source
from sparsify.frontend.tracing.positions import with_positions
from sparsify.words import check_amount

# How much is drawn where nobody says: as in the papers.
_SAMPLES = 128
# From the model itself: token by token is slow; fewer, shorter sequences serve (one sample already does most:
# 2306.11695).
_SELF_SAMPLES, _SELF_LENGTH = 32, 512
# Files of a folder that are named to the user.
_SAID = 8


@dataclass(frozen=True)
class Calibration:
    """Batches ready to run, all of one shape.

    Attributes:
        batches: input name to tensor. ``label``: where they came from, as said to the user.
        digest: sha256 of every tensor, for the manifest.
        plumbing: whether they are no data at all, and good for trying things out only.
        labels: per batch, what a loss compares the outputs with, where the data brought any.
        drawn: of a folder, how many sequences are from which file.
        template: sha256 of the chat template that was given in place of the model's own.
    """

    batches: list[dict[str, Tensor]]
    label: str
    digest: str
    labels: list[Tensor] | None = None
    plumbing: bool = False
    drawn: Mapping[str, int] = field(default_factory=dict)
    template: str | None = None

    @property
    def sequences(self) -> int:
        return count_sequences(self.batches)

    @property
    def size(self) -> str:
        """How much there is, in words."""
        first = next(iter(self.batches[0].values()))
        text = first.dim() == 2 and not first.is_floating_point()
        return f"{self.sequences} × {self.sequence_length} tokens" if text else f"{self.sequences} samples"

    @property
    def sequence_length(self) -> int:
        first = next(iter(self.batches[0].values()))
        return first.shape[1] if first.dim() == 2 else 1

    @property
    def said(self) -> str:
        """Where they came from, with what was drawn from which file."""
        most = sorted(self.drawn.items(), key=lambda item: -item[1])[:_SAID]
        more = f" and {len(self.drawn) - _SAID} more" if len(self.drawn) > _SAID else ""
        return self.label + (f": {', '.join(f'{count} of {name}' for name, count in most)}{more}" if most else "")


@dataclass(frozen=True)
class _Drawn:
    """Token ids [samples, length], where they came from, and how many of which file."""

    ids: Tensor
    label: str
    files: Mapping[str, int] = field(default_factory=dict)


def count_sequences(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Rows of all batches: sequences of text, images, samples."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def load_calibration(
    data: str | Path | Iterable[Any] | Calibration | None,
    source: Source,
    *,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    rows: int | None = None,
    chat: Chat | None = None,
    both: bool = False,
) -> Calibration:
    """Batches from ``data``: a source's name or path, a list of texts, an iterable of batches, or None for C4 and,
    without it, ``self``.

    Args:
        rows: the most rows of a batch: 1, as gradients per sample need them, or None, as many as run well.
        chat: renders chat messages; None: by the template of the model's tokenizer.
        both: the source is held-out data as well; see :func:`sparsify.data.sources.read_documents`.

    Raises:
        CalibrationError: nothing there, too short, ids past the vocabulary, or batches of different kinds.
        SpecError: amounts that the model has no positions for.
    """
    if isinstance(data, Calibration):
        return data
    given = named_or_given(data)
    check_amount(samples, sequence_length)
    chat, files = chat or Chat(source), dict[str, int]()
    if given is None or isinstance(given, str) or are_texts(given):
        check_length(sequence_length, source)
    if given is not None and not isinstance(given, str) and not are_texts(given):
        batches, label = given_batches(given, source, samples), "batches given in Python"
    elif isinstance(given, str) and _names_images(given, source):
        images = read_images(Path(given), source, samples or _SAMPLES, seed)
        pixels = {"pixel_values": images.pixels} | ({} if images.labels is None else {"labels": images.labels})
        batches, label = rows_to_batches(pixels, whole=False), images.note
    elif isinstance(given, str) and names_image_text(given, source):
        pictured = read_image_text(given, source, samples or _SAMPLES, sequence_length, seed, chat)
        batches, label = pictured.batches, pictured.note
    else:
        drawn = _from_name(given, source, samples, sequence_length, seed, chat, both)
        batches, label, files = (
            rows_to_batches(as_inputs(drawn.ids, source), whole=True),
            drawn.label,
            dict(drawn.files),
        )
    most = 1 if one_row_alone(source) else rows
    # Of images cut into patches no row can be told; only who needs single samples cannot go on without.
    told = most == 1 or all(len({len(t) for t in batch.values()}) == 1 for batch in batches)
    if most is not None and told and any(len(next(iter(batch.values()))) > most for batch in batches):
        batches = split_rows(batches, most)
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
    return Calibration(
        batches,
        label,
        digest.hexdigest(),
        labels,
        plumbing=given == "random",
        drawn=files,
        template=chat.digest if chat.used else None,
    )


def expected_batch(
    data: str | None,
    source: Source,
    *,
    samples: int | None = None,
    sequence_length: int | None = None,
    most: int | None = None,
) -> dict[str, Tensor]:
    """A batch with nothing in it, of the shape that :func:`load_calibration` will give of a named source.

    A model is traced by it before anything is drawn, which may take minutes. A source that turns out otherwise (fewer
    images, C4 that is not to be had) costs another trace.

    Raises:
        CalibrationError: the model's inputs cannot be guessed from its config.
    """
    most = 1 if one_row_alone(source) else most
    if data is not None and _names_images(data, source):
        rows = rows_at_once(samples or _SAMPLES, IMAGE_TOKENS)
        return example_batch(source, fewer_rows(rows, most))
    check_length(sequence_length, source)
    own = data == "self"
    length = sequence_length or default_length(source, _SELF_LENGTH if own else USUAL)
    rows = rows_at_once(samples or (_SELF_SAMPLES if own else _SAMPLES), length)
    return example_batch(source, fewer_rows(rows, most), length)


def _names_images(data: str, source: Source) -> bool:
    return getattr(source.module, "main_input_name", None) == "pixel_values" and kind_at(data) == "folder"


def evaluation_windows(
    data: str | Sequence[str],
    source: Source,
    length: int | None,
    limit: int | None,
    chat: Chat | None = None,
    *,
    both: bool = False,
) -> tuple[Tensor, str]:
    """Disjoint windows of held-out text, [windows, length] int32, and where they are from.

    Args:
        data: a source's name, or texts. chat, both: as for :func:`load_calibration`.
    """
    check_length(length, source)
    if isinstance(data, str):
        documents = read_documents(data, "heldout", chat or Chat(source), both=both)
    else:
        documents = given_texts(data)
    with Refusing(documents.label if not isinstance(data, str) else data):
        windows = disjoint_windows(documents, _encoder(source), length or default_length(source), limit)
    return windows, documents.label


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


def _from_name(
    data: str | Sequence[str] | None,
    source: Source,
    samples: int | None,
    length: int | None,
    seed: int,
    chat: Chat,
    both: bool,
) -> _Drawn:
    name = getattr(source.module, "main_input_name", None)
    others = other_inputs(source)
    asked = f"calibration for {type(source.module).__name__}, none being named"
    if data is not None:
        asked = f"calibration '{data}'" if isinstance(data, str) else f"calibration on {len(data)} texts"
        asked += f" for {type(source.module).__name__}"
    if source.is_transformers and (name != "input_ids" or others):
        raise CalibrationError(
            asked,
            found=f"the model reads {' and '.join(dict.fromkeys([str(name), *others]))}, not text"
            + (" alone" if name == "input_ids" else "")
            + (f", and '{data}' is no folder here" if name == "pixel_values" and isinstance(data, str) else ""),
            do="Name a folder of images"
            if name == "pixel_values"
            else "Give batches as keyword dictionaries in Python",
        )
    if not source.is_transformers:
        raise CalibrationError(
            asked,
            found="a module that is no transformers model, so its inputs are unknown",
            do="Give batches: tensors, tuples or keyword dictionaries",
        )
    why = ""
    if data is None:
        try:
            documents = read_documents("c4", "calibration")
            return _windows(documents, source, samples or _SAMPLES, length or default_length(source), seed)
        except SparsifyError as error:
            if not writes_text(source):
                raise CalibrationError(
                    asked,
                    found=f"C4 is not to be had ({error.found}), and the model does not generate text from nothing",
                    do="Give --calibration a text file or another source",
                ) from error
            data, why = "self", f", because C4 is not to be had: {error.found}"
    if data == "random":
        vocabulary = source.vocab_size
        if not vocabulary:
            raise CalibrationError("calibration 'random'", found="a config without vocab_size", do=f"Name {FORMS}")
        shape = (samples or _SAMPLES, length or default_length(source))
        ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
        return _Drawn(ids, "random token ids, which are NOT text: good for speed and plumbing, not for quality")
    if data == "self":
        ids = sample_from_model(source, samples or _SELF_SAMPLES, length or default_length(source, _SELF_LENGTH), seed)
        return _Drawn(ids, f"self (sampled from the model, seed {seed}{why})")
    documents = read_documents(data, "calibration", chat, both=both) if isinstance(data, str) else given_texts(data)
    return _windows(documents, source, samples or _SAMPLES, length or default_length(source), seed)


def _windows(documents: Documents, source: Source, samples: int, length: int, seed: int) -> _Drawn:
    drawn: list[int] = []
    with Refusing(documents.label):
        ids = random_windows(documents, _encoder(source), samples, length, seed, drawn)
    files, stop = dict[str, int](), 0
    for name, count in documents.files:
        begin, stop = stop, stop + count
        if chosen := sum(begin <= index < stop for index in drawn):
            files[name] = chosen
    return _Drawn(ids, documents.label, files)


def _encoder(source: Source) -> Encode:
    def encode(text: str, special: bool = True) -> Tensor:
        # Longer than the model's context on purpose: windows are cut afterwards.
        return torch.tensor(source.tokenizer()(text, add_special_tokens=special, verbose=False)["input_ids"]).long()

    return encode


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
            if not are_ids(tensor):
                raise CalibrationError(
                    f"batch {index} of calibration input {name}", found=f"{tensor.dtype}", do="Ids are whole numbers"
                )
            if tensor.dim() == 2 and "position_ids" not in batch:
                check_table(tensor.shape[1], source)
                if index == 0:
                    warn_of_length(tensor.shape[1], source)
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or (vocabulary and high >= vocabulary):
                raise outside(low if low < 0 else high, f"calibration batch {index}", source)
