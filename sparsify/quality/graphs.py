"""Folders that another runtime than torch runs, found through the registry: no room here knows a backend."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sparsify.files.reading import kind_at
from sparsify.method.registry import loaded


class Graph(Protocol):
    """What such a folder is, opened."""

    name: str
    folder: Path
    # Names of what goes in.
    inputs: Collection[str]

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What comes out, in float32 on the CPU, of inputs whose first dimension is the batch.

        Raises:
            BackendError: it does not run.
        """

    def config(self) -> Any:
        """The model's config, as transformers reads it.

        Raises:
            CheckpointError: there is none.
        """

    def tokenizer(self) -> Any:
        """The tokenizer beside it.

        Raises:
            CheckpointError: there is none.
        """


def open_graph(model: object, *, device: str = "auto", check: bool = True) -> Graph | None:
    """``model`` as a graph of another runtime; None where it is none.

    Args:
        device: ``auto`` is the CPU. check: hold a folder of ours against its ``sparsify.json``.

    Raises:
        BackendError, CheckpointError: it is one, and does not load.
    """
    if not isinstance(model, (str, Path)) or not kind_at(model):
        return None
    for _, _, opened in loaded("sparsify.runtimes"):
        graph: Graph | None = opened(Path(model).expanduser().absolute(), device=device, check=check)
        if graph is not None:
            return graph
    return None
