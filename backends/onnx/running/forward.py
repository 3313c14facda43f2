"""An ONNX folder as what answers tasks and names pictures: its logits, in onnxruntime. Light until it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import BackendError, CheckpointError, first_line
from sparsify.files.reading import kind_at

if TYPE_CHECKING:
    from torch import Tensor


def open_forward(path: Path, *, device: str = "auto", check: bool = True) -> Forward | None:
    """The graph of a folder with an ONNX file in it, or of such a file; None of anything else, and of a folder of
    somebody's that holds a checkpoint and a graph beside it.

    Raises:
        BackendError, CheckpointError: it does not load.
    """
    if kind_at(path) == "folder":
        from sparsify.files.checkpoint import INDEX, WEIGHTS
        from sparsify.files.ledger import Ledger

        if not any(path.glob("*.onnx")):
            return None
        checkpoint = (path / WEIGHTS).exists() or (path / INDEX).exists()
        if checkpoint and "onnx" not in Ledger.of(path, False).manifest:
            return None
    elif kind_at(path) != "file" or path.suffix != ".onnx":
        return None
    return Forward(path, "cpu" if device == "auto" else device.partition(":")[0], check)


class Forward:
    """A graph with ``logits``: a decoder, which reads token ids, or a classifier, which reads one other tensor."""

    def __init__(self, path: Path, device: str, check: bool) -> None:
        from sparsify.backends.onnx.running.runner import Runner
        from sparsify.backends.onnx.running.session import find_onnx, open_session
        from sparsify.backends.onnx.storage.store import check_written

        self.file = find_onnx(path)
        self.folder, self.name = self.file.parent, self.file.parent.name
        check_written(self.file, check)
        self.session = open_session(self.file, device=device)
        self.inputs = [given.name for given in self.session.get_inputs()]
        self._runner = Runner(self.file, session=self.session, check=False) if "input_ids" in self.inputs else None

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """In float32.

        Raises:
            BackendError: the graph does not run on them, or gives no logits.
        """
        import numpy as np
        import torch

        if self._runner is not None:
            ids = inputs["input_ids"].numpy()
            cache = self._runner.empty(len(ids))
            given, _ = self._runner.forward(ids, np.ones_like(ids), cache)
        else:
            given = self._run(inputs)
        return torch.from_numpy(given.astype(np.float32))

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        from sparsify.backends.onnx.running.session import feed_of

        try:
            (logits,) = self.session.run(["logits"], feed_of(self.session, inputs))
        except Exception as error:  # onnxruntime's own kinds are not importable by name
            raise BackendError(
                f"running {self.file}",
                found=f"the graph gives no logits of {', '.join(inputs)} ({first_line(error)})",
                do="sparsify verify says whether the files are whole",
            ) from error
        return logits

    def config(self) -> Any:
        """The ``config.json`` beside the graph.

        Raises:
            CheckpointError: none that transformers reads.
        """
        from sparsify.backends.onnx.running.session import config_beside

        return config_beside(self.file)

    def tokenizer(self) -> Any:
        """The tokenizer beside the graph.

        Raises:
            CheckpointError: none that loads.
        """
        from sparsify.backends.onnx.running.talk import folder_tokenizer
        from sparsify.files.companions import tokenizer_files

        if not tokenizer_files(self.folder):
            # transformers would make an empty one up from the config.
            raise CheckpointError(
                f"a tokenizer for {self.name}", found=f"no tokenizer files in {self.folder}", do="Copy them there"
            )
        return folder_tokenizer(self.folder)
