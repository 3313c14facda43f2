"""Where text comes from: the forms of ``--calibration`` and ``--data``, each as a sequence of documents.

A document is text, or token ids already; it is read when it is asked for. Model-made data (``self``, ``random``) is in
:mod:`sparsify.data.batches`, which needs the model.
"""

from __future__ import annotations

import filecmp
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sparsify.context import Progress, report
from sparsify.data.chat import Render
from sparsify.data.opening import COMPRESSED
from sparsify.data.parts import Documents, Several, Split, part_of
from sparsify.data.rows import USUAL_FIELDS, Column, Document, Lines, Table, TokenRows, read_token_file, usual_field
from sparsify.data.texts import text_of_file
from sparsify.errors import CalibrationError, first_line
from sparsify.files.reading import kind_at

FORMS = (
    "a text file, FILE.jsonl[:field], FILE.parquet[:field], FILE.safetensors[:tensor] of token ids, a folder of such "
    "files, python-stdlib, c4, a Hugging Face dataset id[:config[:split[:field]]], self, or random"
)
# Entries of a folder and those below it that are looked at.
MAX_ENTRIES = 1 << 16

_DATA = (".jsonl", ".json", ".parquet", ".safetensors")
# Of a folder: neither the code nor the description of a data set is its text.
_OF_FOLDERS = (".txt", ".text", *_DATA)


def read_documents(spec: str, split: Split, chat: Render | None = None, *, both: bool = False) -> Documents:
    """The documents that ``spec`` names.

    Args:
        split: which part of a source that has parts; calibration and held-out parts never overlap.
        chat: makes token ids of chat messages.
        both: the source serves for both (:func:`same_source`), and is cut in two: see
            :func:`sparsify.data.parts.part_of`.

    Raises:
        CalibrationError: no such file, field or data set, or it is empty.
    """
    report(Progress("reading data", what=spec))
    found = _read(spec, split, chat)
    if both and found.documents:
        found = part_of(found, split)
    if not found.documents:
        raise CalibrationError(f"data '{spec}'", found="no documents in it", do="Name another source")
    return found


def check_named(*specs: object) -> None:
    """Refuse names of files that are not there, before a model is opened; what is no name is passed over.

    Raises:
        CalibrationError: no such file, or none that can be read.
    """
    for spec in specs:
        if isinstance(spec, str):
            _kind_named(spec)


def same_source(calibration: str, heldout: str) -> bool:
    """Whether what is calibrated on and what is held out are the same documents, which have to be shared out then.

    A file and its copy are. Data sets whose splits are not named are not: calibration takes ``train``, the other
    ``test``.
    """
    one, other = (spec.partition(":")[0] for spec in (calibration, heldout))
    if kind_at(one) is None or kind_at(other) is None:
        return _named_part(calibration, "calibration")[:3] == _named_part(heldout, "heldout")[:3]
    first, second = Path(one).expanduser(), Path(other).expanduser()
    return first.samefile(second) or _same_bytes(first, second)


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are copies of each other; only where they are as long as each other are they read."""
    if kind_at(one) != "file" or kind_at(other) != "file":
        return False
    return one.stat().st_size == other.stat().st_size and filecmp.cmp(one, other, shallow=False)


def _read(spec: str, split: Split, chat: Render | None) -> Documents:
    if spec == "python-stdlib":
        return Documents(f"python-stdlib ({split} half)", list(python_stdlib(split)))
    if spec == "c4":
        return Documents("c4", c4(split))
    path, _, field = spec.partition(":")
    kind = _kind_named(spec)
    if kind == "folder":
        return _folder(Path(path).expanduser(), field, chat)
    if kind == "file":
        return _file(Path(path).expanduser(), field, chat)
    return _dataset(spec, split, chat)


def _kind_named(spec: str) -> Literal["folder", "file"] | None:
    """What lies where ``spec`` points; None where it names no place."""
    path = spec.partition(":")[0]
    # No name is no folder, and not the one that the command runs in.
    kind = kind_at(path) if path else None
    if kind == "other":
        raise CalibrationError(f"data '{spec}'", found="no regular file", do=f"Name {FORMS}")
    told = suffix_of(path) in (*_OF_FOLDERS, ".md", ".py") or path.startswith(("/", ".", "~")) or not path
    if kind is None and told:
        raise CalibrationError(f"data '{spec}'", found="no such file", do=f"Name {FORMS}")
    return kind


def suffix_of(path: str | Path) -> str:
    """What a file is by its name, compressed or not."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _file(path: Path, field: str, chat: Render | None) -> Documents:
    try:
        suffix = suffix_of(path)
        if suffix in (".jsonl", ".json"):
            lines = Lines(path, field, chat)
            return Documents(f"{path}:{lines.field}" if lines.field else str(path), lines, packed=lines.chats > 0)
        if suffix == ".parquet":
            return _parquet(path, field, chat)
        if suffix == ".safetensors":
            name, ids = read_token_file(path, field, FORMS)
            return Documents(f"{path}:{name}", [ids] if ids.dim() == 1 else TokenRows(ids), fixed=ids.dim() == 2)
        return _text(path, field)
    except OSError as error:
        raise CalibrationError(
            f"data '{path}'", found=f"cannot be read ({error.strerror or error})", do="Check the file"
        ) from error


def _folder(folder: Path, field: str, chat: Render | None) -> Documents:
    """Every file of text, JSON, parquet or token ids in ``folder`` and the folders below it, in the order of names."""
    paths = []
    for count, path in enumerate(folder.rglob("*")):
        if count == MAX_ENTRIES:
            found = f"more than {MAX_ENTRIES} files and folders below it"
            raise CalibrationError(f"data '{folder}'", found=found, do="Name a folder of data alone")
        if suffix_of(path) in _OF_FOLDERS and kind_at(path) == "file":
            paths.append(path)
    if not paths:
        found = f"a folder without files of text ({', '.join(_OF_FOLDERS)})"
        raise CalibrationError(f"data '{folder}'", found=found, do=f"Name {FORMS}")
    parts, files = [], []
    for path in sorted(paths):
        part = _file(path, field if suffix_of(path) in _DATA else "", chat)
        parts.append(part)
        files.append((path.relative_to(folder).as_posix(), len(part.documents)))
    for (name, _), part in zip(files, parts, strict=True):
        if isinstance(part.documents, Lines) and part.documents.images:
            found = f"images in {name}, where text alone is read"
            do = f"Name that file itself ({folder / name}), if the model reads images; else leave it out"
            raise CalibrationError(f"data '{folder}'", found=found, do=do)
    if any(part.packed for part in parts) and not all(part.packed for part in parts):
        odd = next(name for (name, _), part in zip(files, parts, strict=True) if not part.packed)
        found = f"chat messages in some files and none in {odd}"
        raise CalibrationError(f"data '{folder}'", found=found, do="Calibrate on one kind; put the other elsewhere")
    names = f"{len(files)} files" if len(files) > 1 else "1 file"
    return Documents(
        f"{folder} ({names})", Several([p.documents for p in parts]), packed=parts[0].packed, files=tuple(files)
    )


def python_stdlib(split: Split) -> list[str]:
    """Source files of the running Python's standard library, split in two by a hash of their names.

    Of files with the same text only the first counts, so that the parts have none in common.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, bool] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in ("site-packages", "dist-packages", "test", "tests", "idle_test") for part in name.split("/")):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            texts.setdefault(text, hashlib.sha256(name.encode()).digest()[0] % 2 == 1)
    return [text for text, heldout in texts.items() if heldout == (split == "heldout")]


def c4(split: Split) -> Sequence[Document]:
    """The first shard of C4, as the papers use it (algorithms.md, section 1.5)."""
    part, file = {
        "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
        "heldout": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
    }[split]
    _require_hub("c4", "allenai/c4")
    rows = _load_dataset("c4", "allenai/c4", data_files={part: file}, split=part)
    return Column(rows, "text", "c4")


def _text(path: Path, field: str) -> Documents:
    if field:
        raise CalibrationError(f"data '{path}:{field}'", found="a text file has no fields", do=f"Name {FORMS}")
    text = text_of_file(path)
    return Documents(str(path), [] if isinstance(text, str) and not text.strip() else [text])


def _parquet(path: Path, field: str, chat: Render | None) -> Documents:
    try:
        table = Table(path, field, chat)
    except ImportError as error:
        raise CalibrationError(
            f"data '{path}'", found="pyarrow is not installed", do="pip install 'sparsify-fx[data]'"
        ) from error
    return Documents(table.name, table, packed=table.chats > 0)


def _named_part(spec: str, split: Split) -> tuple[str, str, str, str]:
    """A data set's name, configuration, split and field, "" where nobody says."""
    name, config, part, field = (*spec.split(":"), "", "", "")[:4]
    return name, config, part or {"calibration": "train", "heldout": "test"}[split], field


def _dataset(spec: str, split: Split, chat: Render | None) -> Documents:
    name, config, part, field = _named_part(spec, split)
    _require_hub(spec, name)
    rows = _load_dataset(spec, name, config or None, split=part)
    field = field or usual_field(rows.column_names) or USUAL_FIELDS[0]
    if field not in rows.column_names:
        raise CalibrationError(
            f"data '{spec}'",
            found=f"columns {', '.join(rows.column_names)}",
            do=f"Name one: {name}:{config}:{part}:FIELD",
        )
    label = f"{name} ({f'configuration {config}, ' if config else ''}split {part}, field {field})"
    column = Column(rows, field, label, chat)
    return Documents(label, column, packed=column.chats > 0)


def _require_hub(spec: str, name: str) -> None:
    """Ask the hub once, shortly: the loaders themselves retry for half a minute where there is no network."""
    from huggingface_hub import HfApi

    report(Progress("asking the hub", what=name))
    try:
        HfApi().dataset_info(name, timeout=5)
    except Exception as error:  # the hub's client raises many kinds; all mean that it cannot be had
        raise CalibrationError(
            f"data '{spec}'",
            found=f"no such file here, and the hub did not give a data set of that name ({type(error).__name__})",
            do=f"Check the name and the network, or name {FORMS}",
        ) from error


def _load_dataset(spec: str, *args: Any, **kwargs: Any) -> Any:
    report(Progress("fetching data", what=spec))
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"data '{spec}'",
            found="the datasets package is not installed",
            do="pip install 'sparsify-fx[data]'",
        ) from error
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # datasets and its transports raise dozens of kinds; all mean it cannot be had
        raise CalibrationError(
            f"data '{spec}'",
            found=f"the data set does not load ({first_line(error)})",
            do="Check its configuration and split: ID[:config[:split[:field]]]",
        ) from error
