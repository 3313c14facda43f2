"""Files of many documents, of which only those that are asked for are in memory: JSON, parquet, token ids, columns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.chat import Messages, Render, as_messages, called, nul_at
from sparsify.data.opening import MAX_LINE, MAX_RATIO, SMALL, list_as_lines, open_text
from sparsify.data.texts import LongText, text_in_memory
from sparsify.errors import CalibrationError, SparsifyError, first_line
from sparsify.files.json_text import parse_json

Document = str | LongText | Tensor

# Bytes of one document in a line or a table.
MAX_DOCUMENT = MAX_LINE
# Where documents are, where nobody says: a text, or messages.
USUAL_FIELDS = ("text", "messages", "conversations")
# Rows of a table that are read at once.
_ROWS = 64
# Bytes of the header of a file of token ids, which names a few tensors, and of a table's footer.
MAX_TOKENS_HEADER, MAX_FOOTER = 1 << 20, 64 << 20
# Bytes between two places of a .jsonl file that are remembered.
_STRIDE = 1 << 16


class Lines(Sequence[Document]):
    """The documents of a file of JSON Lines, one a line that is not blank, or of one JSON list. All are looked at
    once, none is kept.

    Attributes:
        field: where a row's text is; "" where rows are texts themselves. chats: how many are conversations; images: how
            many of those have images.

    Raises:
        CalibrationError: a line that is too long, no UTF-8, no JSON, or has no such field.
    """

    def __init__(self, path: Path, field: str = "", chat: Render | None = None) -> None:
        text = open_text(path)
        items = list_as_lines(text)
        self._text, self._unit = items or text, "item" if items is not None else "line"
        self.path, self.field, self._chat, self._total = path, field, chat, 0
        self.chats = self.images = 0
        # Of some documents: which, where it begins, and in which line.
        self._places: list[tuple[int, int, int]] = []
        following = 0
        for number, offset, line in self._lines(0, 1):
            if offset >= following:
                self._places.append((self._total, offset, number))
                following = offset + _STRIDE
            row = self._parse(line, number)
            if isinstance(row, Messages):
                self.chats, self.images = self.chats + 1, self.images + row.has_images
            self._total += 1

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Document]:
        return (rendered(value, self._chat) for value in self.rows())

    def __getitem__(self, index: Any) -> Any:
        return rendered(self.row(index), self._chat)

    def rows(self) -> Iterator[Document | Messages]:
        """All of them, conversations as they are."""
        for number, _, line in self._lines(0, 1):
            yield self._parse(line, number)

    def row(self, index: Any) -> Document | Messages:
        """One of them, a conversation as it is."""
        at = range(self._total)[index]
        known, offset, first = self._places[bisect_right(self._places, at, key=lambda place: place[0]) - 1]
        for count, (number, _, line) in enumerate(self._lines(offset, first), known):
            if count == at:
                return self._parse(line, number)
        raise CalibrationError(f"data '{self.path}'", found="it became shorter while it was read", do="Start again")

    def _lines(self, offset: int, number: int) -> Iterator[tuple[int, int, bytes]]:
        for begin, line in self._text.lines(offset):
            if len(line) > MAX_LINE:
                found = f"{self._unit} {number} is longer than {MAX_LINE} bytes"
                raise CalibrationError(f"data '{self.path}'", found=found, do="Cut it into several documents")
            if not line.isspace():
                yield number, begin, line
            number += 1

    def _parse(self, line: bytes, number: int) -> Document | Messages:
        where = f"{self._unit} {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            if isinstance(error.__cause__, UnicodeDecodeError) or b"\0" in line:
                raise self._text.not_utf8() from error
            do = "Give one JSON object a line, or one JSON list"
            raise CalibrationError(f"data '{self.path}'", found=f"{where} is not JSON ({error})", do=do) from error
        if isinstance(row, str) and not self.field:
            return document(row, f"{self.path}, {where}")
        if not self.field and isinstance(row, dict):
            self.field = usual_field(row) or ""
        if not isinstance(row, dict) or self.field not in row:
            raise CalibrationError(f"data '{self.path}'", found=f"{where} {_lacks(row, self.field)}", do=self._how(row))
        return row_value(row[self.field], f"{self.path}, {where}", row)

    def _how(self, row: Any) -> str:
        if isinstance(row, dict) and {"prompt", "instruction"} & row.keys():
            return f"Write what the model sees into one field ({self.path}:FIELD), or into 'messages' with roles"
        if not isinstance(row, dict):
            return f"Every {self._unit} is a text, or all are tables with one and the same field"
        return f"Name it: {self.path}:FIELD"


def _lacks(row: Any, field: str) -> str:
    wanted = f"no field '{field or USUAL_FIELDS[0]}'"
    if not isinstance(row, dict):
        return f"is {called(row)}, not a table with a field '{field or USUAL_FIELDS[0]}'"
    names = ", ".join(map(repr, list(row)[:8])) + (", …" if len(row) > 8 else "")
    return f"has {wanted}, but {names}" if row else f"has {wanted}"


def usual_field(names: Any) -> str | None:
    """Which of ``names`` holds a document where nobody says."""
    return next((name for name in USUAL_FIELDS if name in names), None)


class Table(Sequence[Document]):
    """The documents of a column of a .parquet file, some rows at a time.

    Raises:
        CalibrationError: no sound file, no such column, or one that decodes to out of all proportion.
    """

    def __init__(self, path: Path, field: str = "", chat: Render | None = None) -> None:
        import pyarrow
        import pyarrow.parquet

        self.name, self._chat = f"{path}:{field}" if field else str(path), chat
        self._check_footer(path)
        # Not expanded: one text may stand in a million rows.
        types = (pyarrow.types.is_string, pyarrow.types.is_large_string)
        with Refusing(self.name):
            options = {"pre_buffer": False, "buffer_size": 1 << 20}
            self._file = pyarrow.parquet.ParquetFile(path, **options)
            schema = self._file.schema_arrow
            field = field or usual_field(schema.names) or USUAL_FIELDS[0]
            self.field, self.name = field, f"{path}:{field}"
            if field not in schema.names:
                found = f"no column '{field}', but {', '.join(schema.names[:20])}"
                raise CalibrationError(f"data '{self.name}'", found=found, do=f"Name it: {path}:FIELD")
            if any(is_kind(schema.field(field).type) for is_kind in types):
                self._file = pyarrow.parquet.ParquetFile(path, read_dictionary=[field], **options)
            self._starts = [0]
            for group in range(self._file.metadata.num_row_groups):
                self._check_size(self._file.metadata.row_group(group))
                self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self._held: tuple[int, Iterator[list[Any]], int, list[Any]] | None = None
        self.chats = len(self) if len(self) and isinstance(self.row(0), Messages) else 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Document]:
        number = 1
        for group in range(len(self._starts) - 1):
            for values in self._batches(group):
                for value in values:
                    yield rendered(row_value(value, f"{self.name}, row {number}"), self._chat)
                    number += 1

    def __getitem__(self, index: Any) -> Any:
        return rendered(self.row(index), self._chat)

    def row(self, index: Any) -> Document | Messages:
        """One of them, a conversation as it is."""
        at = range(len(self))[index]
        group = bisect_right(self._starts, at) - 1
        row = at - self._starts[group]
        held = self._held
        # Rows are decoded in order: go on from where the last one was, or begin the group anew.
        if held is None or held[0] != group or row < held[2]:
            held = group, self._batches(group), 0, []
        _, batches, start, values = held
        while row >= start + len(values):
            start += len(values)
            values = next(batches)
        self._held = group, batches, start, values
        return row_value(values[row - start], f"{self.name}, row {at + 1}")

    def _batches(self, group: int) -> Iterator[list[Any]]:
        with Refusing(self.name):
            rows = self._file.iter_batches(
                batch_size=_ROWS, row_groups=[group], columns=[self.field], use_threads=False
            )
            for batch in rows:
                column = batch.column(0)
                if column.nbytes > _ROWS * MAX_DOCUMENT:
                    raise _too_long(self.name, f"{column.nbytes} bytes in {len(column)} rows")
                yield column.to_pylist()

    def _check_footer(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8))
            length = int.from_bytes(file.read(4), "little")
        if MAX_FOOTER < length < path.stat().st_size:
            found = f"a footer of {length} bytes, more than {MAX_FOOTER}"
            raise CalibrationError(f"data '{self.name}'", found=found, do="Write it anew with fewer row groups")

    def _check_size(self, group: Any) -> None:
        for number in range(group.num_columns):
            column = group.column(number)
            if column.path_in_schema.partition(".")[0] != self.field:
                continue
            whole, stored = column.total_uncompressed_size, column.total_compressed_size
            if whole > max(SMALL, MAX_RATIO * stored):
                found = f"{stored} bytes that decode to {whole}"
                raise CalibrationError(f"data '{self.name}'", found=found, do="No text is made so small: leave it")


class Refusing:
    """Turns another library's errors, of many kinds, into ours."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, SparsifyError):
            found = f"cannot be read ({first_line(error)})"
            raise CalibrationError(f"data '{self.name}'", found=found, do="Check the file") from error


class Column(Sequence[Document]):
    """The documents of a column of a Hugging Face data set, whose rows lie on the disk."""

    def __init__(self, rows: Any, field: str, name: str, chat: Render | None = None) -> None:
        self.rows, self.field, self.name, self._chat = rows.select_columns([field]), field, name, chat
        self.chats = len(self) if len(self) and isinstance(self.row(0), Messages) else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return rendered(self.row(index), self._chat)

    def row(self, index: Any) -> Document | Messages:
        """One of them, a conversation as it is."""
        at = range(len(self))[index]
        return row_value(self.rows[at][self.field], f"{self.name}, row {at + 1}")


class TokenRows(Sequence[Document]):
    """The rows of ``ids`` [sequences, tokens], which lie in a file."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return self.ids[range(len(self))[index]]


def read_token_file(path: Path, name: str, forms: str) -> tuple[str, Tensor]:
    """The tensor of token ids ``name`` ("" for the only one, or ``input_ids``) of a file, and what it is called.

    Its numbers are read when they are used.

    Raises:
        CalibrationError: no sound safetensors, no such tensor, or none that can be token ids.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_TOKENS_HEADER < length < path.stat().st_size:
        found = f"no file of token ids: a header of {length} bytes, more than {MAX_TOKENS_HEADER}"
        raise CalibrationError(f"data '{path}'", found=found, do=f"Name {forms}")
    try:
        with safe_open(path, framework="pt") as held:
            names = sorted(held.keys())
            chosen = name or ("input_ids" if "input_ids" in names else next(iter(names), ""))
            if chosen not in names or (not name and len(names) > 1 and chosen != "input_ids"):
                raise CalibrationError(
                    f"data '{path}:{name}'" if name else f"data '{path}'",
                    found=f"tensors {', '.join(names[:20]) or '(none)'}" + (", …" if len(names) > 20 else ""),
                    do=f"Name one of them: {path}:TENSOR",
                )
            ids: Tensor = held.get_tensor(chosen)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"data '{path}'", found=f"no sound safetensors ({error})", do=f"Name {forms}") from error
    if ids.is_floating_point() or ids.is_complex() or ids.dim() not in (1, 2):
        raise CalibrationError(
            f"data '{path}:{chosen}'",
            found=f"a tensor of {ids.dtype} and shape {tuple(ids.shape)}",
            do="Token ids are whole numbers, [tokens] or [sequences, tokens]",
        )
    return chosen, ids


def row_value(value: Any, where: str, row: dict[str, Any] | None = None) -> Document | Messages:
    """The field ``value`` of ``row`` as a document, or as a conversation.

    Raises:
        CalibrationError: neither.
    """
    messages = as_messages(value, where, row)
    return document(value, where) if messages is None else messages


def rendered(value: Document | Messages, chat: Render | None) -> Document:
    """A conversation as token ids; anything else as it is.

    Raises:
        CalibrationError: there is nothing to render it by.
    """
    if not isinstance(value, Messages):
        return value
    if chat is None:
        do = "Name a field of text: FILE:FIELD"
        raise CalibrationError(f"data '{value.where}'", found="chat messages, and no model to read them", do=do)
    return chat(value)


def document(value: Any, where: str) -> Document:
    """A value of a row as a document.

    Raises:
        CalibrationError: neither text nor a list of token ids, text with a NUL, or longer than ``MAX_DOCUMENT``.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise nul_at(value, where)
        if len(value) > MAX_DOCUMENT:
            raise _too_long(where, f"a text of {len(value)} characters")
        return text_in_memory(value, where)
    # A vocabulary is smaller; what is larger fits no tensor.
    if isinstance(value, list) and all(type(i) is int and abs(i) < 1 << 31 for i in value):
        return torch.tensor(value, dtype=torch.long)
    raise CalibrationError(f"data '{where}'", found=called(value), do="A document is text or a list of token ids")


def _too_long(where: str, found: str) -> CalibrationError:
    do = f"Cut it into documents of at most {MAX_DOCUMENT} bytes"
    return CalibrationError(f"data '{where}'", found=found, do=do)
