"""The weights of an ONNX file or folder for whoever asks for named tensors and knows no graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.files.ledger import Ledger
from sparsify.files.manifest import section
from sparsify.files.reading import kind_at

if TYPE_CHECKING:
    from sparsify.backends.onnx.storage.store import GraphStore

# What --to onnx writes as weights that are in the graph's files alone.
_WITHOUT_CHECKPOINT = ("external", "packed", "sparse")


def open_folder(folder: Path, ledger: Ledger) -> GraphStore | None:
    """The weights of a folder that ``--to onnx`` wrote without safetensors, for a model of its config.json; None where
    it is none.

    Raises:
        CheckpointError: as :func:`open_graph`.
    """
    ours = section(ledger.manifest, "onnx").get("weights") in _WITHOUT_CHECKPOINT
    return open_graph(folder, ledger) if ours and kind_at(folder / "config.json") == "file" else None


def open_graph(path: Path, ledger: Ledger) -> GraphStore | None:
    """The weights of an ONNX file or folder, held against ``ledger``; None where ``path`` is neither.

    Raises:
        CheckpointError: several ONNX files of which none is ``model.onnx``, or a damaged one.
    """
    kind = kind_at(path)
    if not ((kind == "file" and path.suffix.lower() == ".onnx") or (kind == "folder" and any(path.glob("*.onnx")))):
        return None
    # Every folder is shown to this module, and onnx takes a tenth of a second.
    from sparsify.backends.onnx.running.session import find_onnx
    from sparsify.backends.onnx.storage.store import GraphStore

    transposed = section(ledger.manifest, "onnx").get("transposed", ())
    return GraphStore(find_onnx(path), transposed, ledger)
