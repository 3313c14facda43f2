"""Files of many documents, of which only those that are asked for are in memory: jsonl, parquet, token ids, columns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.texts import LongText, text_in_memory
from sparsify.errors import CalibrationError, SparsifyError, first_line
from sparsify.files.json_text import parse_json

Document = str | LongText | Tensor

# Bytes of one line of a .jsonl file, and of one document in it or in a table.
MAX_LINE = MAX_DOCUMENT = 16 << 20
# Rows of a table that are read at once.
_ROWS = 64
# How many times its size a column may decode to, from so many bytes on. Text is made some ten times smaller.
MAX_RATIO, _SMALL = 64, 64 << 20
# Bytes of the header of a file of token ids, which names a few tensors, and of a table's footer.
MAX_TOKENS_HEADER, MAX_FOOTER = 1 << 20, 64 << 20
# Bytes between two places of a .jsonl file that are remembered.
_STRIDE = 1 << 16


class Lines(Sequence[Document]):
    """The documents of a .jsonl file, one a line that is not blank. All are looked at once, none is kept.

    Raises:
        CalibrationError: a line that is too long, no JSON, or has no such field.
    """

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field, self._total = path, field, 0
        # Of some documents: which, where it begins, and in which line.
        self._places: list[tuple[int, int, int]] = []
        following = 0
        for number, (offset, line) in self._lines(0, 1):
            if offset >= following:
                self._places.append((self._total, offset, number))
                following = offset + _STRIDE
            self._parse(line, number)
            self._total += 1

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Document]:
        for number, (_, line) in self._lines(0, 1):
            yield self._parse(line, number)

    def __getitem__(self, index: Any) -> Any:
        at = range(self._total)[index]
        known, offset, first = self._places[bisect_right(self._places, at, key=lambda place: place[0]) - 1]
        for count, (number, (_, line)) in enumerate(self._lines(offset, first), known):
            if count == at:
                return self._parse(line, number)
        raise CalibrationError(f"data '{self.path}'", found="it became shorter while it was read", do="Start again")

    def _lines(self, offset: int, number: int) -> Iterator[tuple[int, tuple[int, bytes]]]:
        with self.path.open("rb", buffering=1 << 16) as file:
            file.seek(offset)
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    found = f"line {number} is longer than {MAX_LINE} bytes"
                    raise CalibrationError(f"data '{self.path}'", found=found, do="Cut it into several documents")
                if not line.isspace():
                    yield number, (offset, line)
                offset += len(line)
                number += 1

    def _parse(self, line: bytes, number: int) -> Document:
        try:
            row = parse_json(line)
        except ValueError as error:
            raise CalibrationError(
                f"data '{self.path}'", found=f"line {number} is not JSON ({error})", do="Give one JSON object a line"
            ) from error
        if not isinstance(row, dict) or self.field not in row:
            found = f"line {number} has no field '{self.field}'"
            raise CalibrationError(f"data '{self.path}'", found=found, do=f"Name it: {self.path}:FIELD")
        return document(row[self.field], f"{self.path}, line {number}")


class Table(Sequence[Document]):
    """The documents of a column of a .parquet file, some rows at a time.

    Raises:
        CalibrationError: no sound file, no such column, or one that decodes to out of all proportion.
    """

    def __init__(self, path: Path, field: str) -> None:
        import pyarrow
        import pyarrow.parquet

        self.field, self.name = field, f"{path}:{field}"
        self._check_footer(path)
        # Not expanded: one text may stand in a million rows.
        types = (pyarrow.types.is_string, pyarrow.types.is_large_string)
        with Refusing(self.name):
            options = {"pre_buffer": False, "buffer_size": 1 << 20}
            self._file = pyarrow.parquet.ParquetFile(path, **options)
            schema = self._file.schema_arrow
            if field not in schema.names:
                raise CalibrationError(f"data '{self.name}'", found=f"no column '{field}'", do=f"Name it: {path}:FIELD")
            if any(is_kind(schema.field(field).type) for is_kind in types):
                self._file = pyarrow.parquet.ParquetFile(path, read_dictionary=[field], **options)
            self._starts = [0]
            for group in range(self._file.metadata.num_row_groups):
                self._check_size(self._file.metadata.row_group(group))
                self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self._held: tuple[int, Iterator[list[Any]], int, list[Any]] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Document]:
        for group in range(len(self._starts) - 1):
            for values in self._batches(group):
                yield from (document(value, self.name) for value in values)

    def __getitem__(self, index: Any) -> Any:
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
        return document(values[row - start], self.name)

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
            if whole > max(_SMALL, MAX_RATIO * stored):
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

    def __init__(self, rows: Any, field: str, name: str) -> None:
        self.rows, self.field, self.name = rows.select_columns([field]), field, name

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return document(self.rows[range(len(self))[index]][self.field], self.name)


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
                    f"data '{path}:{name}'",
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


def document(value: Any, where: str) -> Document:
    """A value of a row as a document.

    Raises:
        CalibrationError: neither text nor a list of token ids, or longer than ``MAX_DOCUMENT``.
    """
    if isinstance(value, str):
        if len(value) > MAX_DOCUMENT:
            raise _too_long(where, f"a text of {len(value)} characters")
        return text_in_memory(value, where)
    # A vocabulary is smaller; what is larger fits no tensor.
    if isinstance(value, list) and all(type(i) is int and abs(i) < 1 << 31 for i in value):
        return torch.tensor(value, dtype=torch.long)
    raise CalibrationError(
        f"data '{where}'", found=f"a {type(value).__name__}", do="A document is text or a list of token ids"
    )


def _too_long(where: str, found: str) -> CalibrationError:
    do = f"Cut it into documents of at most {MAX_DOCUMENT} bytes"
    return CalibrationError(f"data '{where}'", found=found, do=do)
