"""What lies beside the weights in a model folder: tokenizer, configs, code, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files.json_text import parse_json
from sparsify.files.ledger import Ledger
from sparsify.files.manifest import MANIFEST, write_json
from sparsify.files.reading import MAX_CONFIG, MAX_INDEX, admit, kind_at, read_json

# Files that hold weights, of any framework. They are written anew or left behind: copied they would still be dense.
WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".data"}
)
# What models and tokenizers are loaded from, and fetched from the hub; who loads goes on without some of it.
_LOADED = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".py"})


# What describes weights of a format that an output does not carry: a file is left out where weights of its kind are.
_DESCRIBE = {
    "adapter_config.json": "adapter_model.*",
    "params.json": "consolidated*",
    "openvino_model.xml": "openvino_model.bin",
    "genai_config.json": "*.onnx",
    "libsparsify_onnx.so": "*.onnx",
}
# Files that a sub-folder may have, and levels below it; what has more is no part of a model.
MAX_FILES, MAX_LEVELS = 1000, 8
# Weights of the whole model in the forms of other programs, and states of a training.
_FOREIGN = frozenset({".onnx", ".onnx_data", ".gguf", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".tflite", ".xml"})
# Sub-folders that are called so hold the model for other programs; of a hub id their weights were not even fetched.
_FORMATS = frozenset({"onnx", "openvino", "original", "gguf", "coreml", "metal", "mlx", "tflite"})
MODULES = "modules.json"
_TOKENIZER = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "tekken")
# What belongs to a tokenizer and is none.
_BESIDE_TOKENIZER = ("added_tokens", "special_tokens_map", "chat_template")


def holds_weights(name: str) -> bool:
    """Whether a file of that name holds weights or says where they are, an adapter's among them."""
    return Path(name).suffix.lower() in WEIGHT_SUFFIXES or name.endswith(".index.json") or name == "adapter_config.json"


def companions(folder: Path, written: str = "") -> Iterator[Path]:
    """The files that an output carries along: those beside the weights, and all of the sub-folders that belong to the
    model (``1_Pooling``, ``2_Dense`` with its own weights, ``additional_chat_templates``).

    No weights of the model, no index of weights, no manifest; see :func:`left_out`.

    Args:
        written: the pattern of the weights that the output has too: what describes such is carried.

    Raises:
        CheckpointError: one that is no regular file of the folder; see :func:`sparsify.files.reading.admit`.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise CheckpointError(
            f"model folder {folder}", found=found, do="Name a folder that sparsify or Hugging Face wrote"
        )
    dropped = {path.name for path in _without_weights(folder, written)}
    for path in folder.iterdir():
        if path.name.startswith(".") or path.is_dir():
            continue
        if not holds_weights(path.name) and path.name != MANIFEST and path.name not in dropped:
            yield admit(path)
    for inner in _subfolders(folder):
        if (files := _files_of(inner, folder)) is not None:
            yield from map(admit, files)


def tokenizer_files(folder: Path, beside: bool = False) -> list[Path]:
    """The files of ``folder`` that a tokenizer is loaded from; with ``beside`` what belongs to one too."""
    names = (*_TOKENIZER, *(_BESIDE_TOKENIZER if beside else ()))
    return sorted(path for path in folder.iterdir() if path.name.startswith(names))


def left_out(folder: Path, weights: Container[str] = ()) -> list[str]:
    """What of ``folder`` an output does not carry: weights other than those that are read, what only describes such,
    and sub-folders that hold the model once more or are no part of it. Those of sub-folders end with a slash.

    Args:
        weights: the names of the files that are read, and of their index.
    """
    dropped = {path.name for path in _without_weights(folder)}
    names = [
        path.name
        for path in folder.iterdir()
        if not path.is_dir()
        and not path.name.startswith(".")
        and path.name not in weights
        and (holds_weights(path.name) or path.name in dropped)
    ]
    return sorted([*names, *(f"{i.name}/" for i in _subfolders(folder) if _files_of(i, folder) is None)])


def _without_weights(folder: Path, written: str = "") -> Iterator[Path]:
    for name, weights in _DESCRIBE.items():
        if weights == written:
            continue
        if (folder / name).exists() and (name == "adapter_config.json" or any(folder.glob(weights))):
            yield folder / name


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__pycache__")))


def _files_of(inner: Path, folder: Path) -> list[Path] | None:
    """The files of a sub-folder, its own sub-folders' among them; None where the whole of it is left out."""
    if inner.is_symlink():
        return None
    files: list[Path] = []
    whole, size = inner.name in _FORMATS, 0
    for at, folders, names in os.walk(inner):
        here = Path(at)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        if len(here.relative_to(inner).parts) >= MAX_LEVELS or len(files) + len(names) > MAX_FILES:
            return None
        if any((here / name).is_symlink() for name in folders):
            return None
        files += [here / name for name in sorted(names) if not name.startswith(".")]
        whole = whole or any(Path(name).suffix.lower() in _FOREIGN for name in names)
        held = [name for name in names if Path(name).suffix.lower() in WEIGHT_SUFFIXES]
        size += sum((here / name).lstat().st_size for name in held)
        whole = whole or (bool(held) and is_model(here / "config.json"))
    # Half of the weights and more are the weights again: in another layout, under other names.
    own = sum(p.stat().st_size for p in folder.iterdir() if p.suffix.lower() in WEIGHT_SUFFIXES and p.is_file())
    whole = whole or 0 < own < 2 * size
    return None if whole and inner.name not in _modules(folder) else files


def is_model(config: Path) -> bool:
    """Whether a config.json is that of a model that transformers would load."""
    try:
        return kind_at(config) == "file" and bool(read_json(config).keys() & {"model_type", "architectures"})
    except CheckpointError:  # (no model's then; where the file is carried it is looked at once more)
        return False


def _modules(folder: Path) -> set[str]:
    """The sub-folders that a sentence-transformers model runs after the model proper."""
    if kind_at(folder / MODULES) != "file" or (folder / MODULES).stat().st_size > MAX_CONFIG:
        return set()
    try:
        content = parse_json(admit(folder / MODULES).read_bytes())
    except (OSError, ValueError):  # (whoever loads it says so; here it is only carried along)
        return set()
    steps = content if isinstance(content, list) else []
    paths = (step.get("path") for step in steps if isinstance(step, dict))
    return {path.partition("/")[0] for path in paths if isinstance(path, str)}


def check_companions(folder: Path, ledger: Ledger) -> None:
    """Look at everything that lies beside the weights before any of it is read, by us or by transformers.

    Raises:
        CheckpointError: a file that is not what was written, one that is missing, weights that were added, JSON out of
            bounds, or no regular file of the folder.
    """
    if ledger.complete and folder.is_dir():
        _check_names(folder, ledger)
    held = {path.relative_to(folder).as_posix(): path for path in companions(folder)}
    # What was written once is held against the list also where it would not be carried on.
    beside = (name for name in ledger.files if "/" in name or not holds_weights(name))
    held |= {n: admit(folder / n) for n in beside if n not in held and _is_below(folder, n)}
    for name, path in held.items():
        size = path.stat().st_size
        if path.suffix == ".json" and size > MAX_INDEX:
            raise CheckpointError(f"{path}", found=f"{size} bytes, more than {MAX_INDEX}", do="Fetch the folder again")
        ledger.check_file(path, name)
    if (folder / "generation_config.json").is_file():
        # transformers goes on without one that it cannot read.
        read_json(folder / "generation_config.json")


def _check_names(folder: Path, ledger: Ledger) -> None:
    known = ledger.headers.keys() | ledger.files.keys()
    # Of sub-folders what is known; what was added there nobody reads for the model's.
    here = {path.name for path in folder.iterdir()} | {
        name for name in known if "/" in name and _is_below(folder, name)
    }
    # Read by nobody, or by transformers in place of ours.
    if added := sorted(name for name in here - known if holds_weights(name) and not name.startswith(".")):
        raise ledger.unlike(f"{added[0]} of {folder}", f"{MANIFEST} does not know it")
    gone = sorted(name for name in known - here if Path(name).suffix.lower() in _LOADED)
    if gone:
        raise ledger.unlike(f"{gone[0]} of {folder}", f"{MANIFEST} names it, and it is not there")


def _is_below(folder: Path, name: str) -> bool:
    return ".." not in Path(name).parts and kind_at(folder / name) is not None


def size_of_companions(folder: Path) -> int:
    """The bytes that :func:`copy_companions` would copy from sub-folders, which may hold weights."""
    return sum(path.stat().st_size for path in companions(folder) if path.parent != folder)


def copy_companions(folder: Path, into: Path, written: str = "") -> None:
    """Copy the companions of ``folder``'s weights into the folder ``into``; ``written``: see :func:`companions`."""
    for path in companions(folder, written):
        target = into / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the content of ``folder``'s config.json by what ``change`` makes of it."""
    path = folder / "config.json"
    before = read_json(path)
    after = change(before)
    if after is not before:
        write_json(path, after)
