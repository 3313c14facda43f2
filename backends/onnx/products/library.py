"""The library of our operators, beside a graph that asks for them: onnxruntime-genai finds it there by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.errors import BackendError
from sparsify.files.manifest import write_json
from sparsify.files.reading import read_json
from sparsify.runtime.cpu.onnx_library import onnx_library

FILE = "libsparsify_onnx.so"
GENAI = "genai_config.json"
# genai's word for it; it takes a path within the folder alone.
_SESSION, _ASKED = "session_options", "custom_ops_library"


def add_library(folder: Path) -> str:
    """Copy the library into ``folder``, and let ``genai_config.json``, where there is one, name it.

    Returns:
        What is to be said of it.
    """
    try:
        library = onnx_library()
    except BackendError as error:
        return f"no {FILE} in the folder ({error.found}): onnxruntime-genai runs it at dense speed"
    # No link, and no other rights than a file has that is written here.
    shutil.copyfile(library, folder / FILE)
    if (folder / GENAI).is_file():
        write_json(folder / GENAI, _changed(folder / GENAI, lambda own: {**own, _ASKED: FILE}))
    return f"{FILE}: the operators, for programs without sparsify, on machines like this one (docs/onnx.md)"


def without_library(folder: Path, into: Path) -> None:
    """Undo :func:`add_library` in ``into``, a copy of ``folder``.

    Raises:
        CheckpointError: ``genai_config.json`` is no table of JSON, so nobody can tell whether it asks for the library.
    """
    (into / FILE).unlink(missing_ok=True)
    if (folder / GENAI).is_file():
        changed = _changed(folder / GENAI, lambda own: {key: value for key, value in own.items() if key != _ASKED})
        write_json(into / GENAI, changed)


def _changed(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """What a ``genai_config.json`` says with other session options; as it is where it is not one that we wrote."""
    config = read_json(path)
    try:
        decoder = config["model"]["decoder"]
        decoder[_SESSION] = change(decoder[_SESSION])
    except (KeyError, TypeError, AttributeError):
        pass
    return config
