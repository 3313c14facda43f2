"""Write the folder of a smaller model: the source's files, a changed config, and other tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.checkpoint import INDEX
from sparsify.manifest import MANIFEST
from sparsify.safetensors_file import lay_out, lay_out_files, layout_of
from sparsify.source import Source
from sparsify.weights import Weights

# Files of a model folder that hold weights, which are written anew.
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".data"}


def write_files(source: Source, weights: Weights, dense: Weights, config: Mapping[str, Any], into: Path) -> None:
    """The parameters of ``weights`` under the names that the checkpoint of ``dense`` has for them."""

    def stored() -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors, those of one parameter at a time; then what the checkpoint holds beside parameters."""
        seen: set[str] = set()
        for name in dense.parameters():
            for tensor, value in dense.stored(name, weights.read(name)).items():
                yield tensor, value
            # One conversion may make fewer tensors of a smaller parameter: those that are left over go.
            seen |= set(dense.sources(name))
        for tensor in dense.store.names():
            if tensor not in seen:
                yield tensor, dense.store.read(tensor)

    write_tensors(source, stored, config, into)


def write_tensors(
    source: Source, stored: Callable[[], Iterator[tuple[str, Tensor]]], config: Mapping[str, Any], into: Path
) -> None:
    """The files of ``source`` with other tensors and a changed config."""
    assert source.folder is not None, "a model in memory was saved first"
    for path in source.folder.iterdir():
        if path.is_file() and path.suffix not in _WEIGHT_FILES and path.name not in (INDEX, MANIFEST):
            shutil.copyfile(path, into / path.name)
    text = json.loads((into / "config.json").read_text(encoding="utf-8"))
    place = text["text_config"] if isinstance(text.get("text_config"), dict) else text
    place.update(config)
    (into / "config.json").write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Twice over the tensors, and never all of them at once.
    shapes = {name: (value.dtype, list(value.shape)) for name, value in stored()}
    if source.checkpoint is None:
        out = lay_out(into, shapes)
    else:
        files = {f: {n: shapes[n] for n in held if n in shapes} for f, held in layout_of(source.checkpoint).items()}
        out = lay_out_files(into, {f: held for f, held in files.items() if held})
    for name, value in stored():
        out.write(name, value.contiguous())
