"""Where text comes from: the forms of ``--calibration`` and ``--data``, each as a sequence of documents.

A document is text, or token ids already; it is read when it is asked for. Model-made data (``self``, ``random``) is in
:mod:`sparsify.data.batches`, which needs the model.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsify.data.rows import Column, Document, Lines, Table, TokenRows, read_token_file
from sparsify.data.texts import text_of_file
from sparsify.errors import CalibrationError, first_line
from sparsify.files.reading import kind_at

Split = Literal["calibration", "heldout"]

FORMS = (
    "a text file, FILE.jsonl[:field], FILE.parquet[:field], FILE.safetensors[:tensor] of token ids, python-stdlib, "
    "c4, a Hugging Face dataset id[:config[:split[:field]]], self, or random"
)


@dataclass(frozen=True)
class Documents:
    """Documents and how to name where they are from. ``fixed``: ready-made samples (rows of token ids, all as long)."""

    label: str
    documents: Sequence[Document]
    fixed: bool = False


def read_documents(spec: str, split: Split) -> Documents:
    """The documents that ``spec`` names.

    Args:
        split: which part of a source that has parts; calibration and held-out parts never overlap.

    Raises:
        CalibrationError: no such file, field or data set, or it is empty.
    """
    found = _read(spec, split)
    if not found.documents:
        raise CalibrationError(f"data '{spec}'", found="no documents in it", do="Name another source")
    return found


def _read(spec: str, split: Split) -> Documents:
    if spec == "python-stdlib":
        return Documents(f"python-stdlib ({split} half)", list(python_stdlib(split)))
    if spec == "c4":
        return Documents("c4", c4(split))
    path, _, field = spec.partition(":")
    if (kind := kind_at(path)) in ("folder", "other"):
        found = "a folder" if kind == "folder" else "no regular file"
        raise CalibrationError(f"data '{spec}'", found=found, do=f"Name {FORMS}")
    readers: dict[str, Callable[[Path, str], Documents]] = {
        ".jsonl": _jsonl,
        ".json": _jsonl,
        ".parquet": _parquet,
        ".safetensors": _token_file,
    }
    suffix = Path(path).suffix.lower()
    if kind == "file":
        try:
            return readers.get(suffix, _text)(Path(path), field)
        except OSError as error:
            raise CalibrationError(
                f"data '{path}'", found=f"cannot be read ({error.strerror or error})", do="Check the file"
            ) from error
    if suffix in (*readers, ".txt", ".md", ".py") or path.startswith(("/", ".", "~")) or not path:
        raise CalibrationError(f"data '{spec}'", found="no such file", do=f"Name {FORMS}")
    return Documents(spec, _dataset(spec, split))


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


def _jsonl(path: Path, field: str) -> Documents:
    field = field or "text"
    return Documents(f"{path}:{field}", Lines(path, field))


def _parquet(path: Path, field: str) -> Documents:
    field = field or "text"
    try:
        return Documents(f"{path}:{field}", Table(path, field))
    except ImportError as error:
        raise CalibrationError(
            f"data '{path}'", found="pyarrow is not installed", do="pip install 'sparsify-fx[data]'"
        ) from error


def _token_file(path: Path, field: str) -> Documents:
    name, ids = read_token_file(path, field, FORMS)
    return Documents(f"{path}:{name}", [ids] if ids.dim() == 1 else TokenRows(ids), fixed=ids.dim() == 2)


def _dataset(spec: str, split: Split) -> Sequence[Document]:
    name, config, part, field = (*spec.split(":"), "", "", "", "")[:4]
    part = part or {"calibration": "train", "heldout": "test"}[split]
    if kind_at(name) is None:
        _require_hub(spec, name)
    rows = _load_dataset(spec, name, config or None, split=part)
    field = field or "text"
    if field not in rows.column_names:
        raise CalibrationError(
            f"data '{spec}'",
            found=f"columns {', '.join(rows.column_names)}",
            do=f"Name one: {name}:{config}:{part}:FIELD",
        )
    return Column(rows, field, spec)


def _require_hub(spec: str, name: str) -> None:
    """Ask the hub once, shortly: the loaders themselves retry for half a minute where there is no network."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=5)
    except Exception as error:  # the hub's client raises many kinds; all mean that it cannot be had
        raise CalibrationError(
            f"data '{spec}'",
            found=f"no such file here, and the hub did not give a data set of that name ({type(error).__name__})",
            do=f"Check the name and the network, or name {FORMS}",
        ) from error


def _load_dataset(spec: str, *args: Any, **kwargs: Any) -> Any:
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
