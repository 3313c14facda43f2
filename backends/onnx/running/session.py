"""ONNX files found and opened in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify.errors import BackendError, CheckpointError, first_line
from sparsify.files.reading import kind_at

FOLD_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"


def open_session(file: Path | bytes, *, device: str = "cpu", threads: int = 0, folder: Path | None = None) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        file: the ONNX file, or its bytes with the ``folder`` that its data lies in.
        device: ``cpu`` or ``cuda``; ``threads``: 0 for onnxruntime's own choice.

    Raises:
        BackendError: onnxruntime has no such device here, or cannot load the file.
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
