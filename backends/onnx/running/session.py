"""ONNX files found and opened in onnxruntime."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify.errors import BackendError, CheckpointError, first_line
from sparsify.files.reading import admit, kind_at
from sparsify.runtime.cpu.onnx_library import onnx_library

if TYPE_CHECKING:
    from torch import Tensor

NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
# A domain and its version, as protobuf writes them.
_OURS = b"\n\x08sparsify"
FOLD_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"


def open_session(
    file: Path | bytes, *, device: str = "cpu", threads: int = 0, folder: Path | None = None, library: bool = True
) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        file: the ONNX file, or its bytes with the ``folder`` that its data lies in.
        device: ``cpu`` or ``cuda``; ``threads``: 0 for onnxruntime's own choice.
        library: register that of our operators where the file names them; without it they run as functions.

    Raises:
        BackendError: onnxruntime has no such device here, or cannot load the file; or it asks for our operators, and
            there is no library of them.
    """
    import onnxruntime as ort

    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    if device not in providers or providers[device] not in ort.get_available_providers():
        have = ", ".join(p.removesuffix("ExecutionProvider").lower() for p in ort.get_available_providers())
        raise BackendError(f"device '{device}'", found=f"this onnxruntime has {have}", do="Use --device cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors come as exceptions; the rest is about onnxruntime.
    options.log_severity_level = 4
    # Above its default of 1 GiB a cast or packed weight would be converted again at every token.
    options.add_session_config_entry(FOLD_LIMIT, str(1 << 40))
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if library and asks_for_ours(file):
        options.register_custom_ops_library(onnx_library())
    try:
        source = str(file) if isinstance(file, Path) else file
        session = ort.InferenceSession(
            source, options, providers=list(dict.fromkeys([providers[device], providers["cpu"]]))
        )
    except Exception as error:  # onnxruntime's own kinds are not importable by name
        name = file if isinstance(file, Path) else "the graph"
        raise BackendError(
            f"loading {name} in onnxruntime {ort.__version__}",
            found=first_line(error),
            do="Opset 23 needs onnxruntime 1.23, 24 needs 1.26; sparsify verify says whether the files are whole",
        ) from error
    if providers[device] not in session.get_providers():
        # It says so in its log alone, and goes on with the CPU.
        raise BackendError(f"device '{device}'", found="onnxruntime finds none here", do="Use --device cpu")
    return session


def asks_for_ours(file: Path | bytes) -> bool:
    """Whether a graph names our domain of operators; it is not parsed."""
    if isinstance(file, bytes):
        return _OURS in file
    try:
        with admit(file).open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text.find(_OURS) >= 0
    except (OSError, ValueError):
        # Of no bytes, or not there: onnxruntime says what is wrong with it.
        return False


def find_onnx(path: Path) -> Path:
    """``path`` itself, or the one ONNX file of a folder.

    Raises:
        CheckpointError: none, or several of which none is ``model.onnx``.
    """
    kind = kind_at(path)
    if kind == "file":
        return path
    files = sorted(path.glob("*.onnx")) if kind == "folder" else []
    if path / "model.onnx" in files:
        return path / "model.onnx"
    if len(files) != 1:
        found = f"{len(files)} ONNX files" if files else "no ONNX file" if kind == "folder" else "no such folder"
        raise CheckpointError(f"ONNX model {path}", found=found, do="Name the file, or write one with --to onnx")
    return files[0]


def feed_of(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Those of ``inputs`` that the graph takes, in the types that it takes them in."""
    kinds = {given.name: NUMPY.get(given.type) for given in session.get_inputs()}
    return {
        name: (value.float() if value.is_floating_point() else value).numpy().astype(kinds[name])
        for name, value in inputs.items()
        if name in kinds
    }


def config_beside(file: Path) -> Any:
    """The ``config.json`` beside an ONNX file.

    Raises:
        CheckpointError: none, or none that transformers reads.
    """
    import transformers

    asked, do = f"config.json of {file.parent}", "Copy the model's config.json there"
    if kind_at(file.parent / "config.json") != "file":
        raise CheckpointError(asked, found="no config.json beside it", do=do)
    try:
        return transformers.AutoConfig.from_pretrained(file.parent, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of many kinds
        raise CheckpointError(asked, found=f"none that transformers reads ({first_line(error)})", do=do) from error
