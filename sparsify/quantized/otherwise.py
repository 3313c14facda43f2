"""A look at a model's folder, before anything large is imported: do its weights seem to lie there in another form?"""

from __future__ import annotations

from pathlib import Path

from sparsify.errors import SparsifyError
from sparsify.files.reading import kind_at, read_json
from sparsify.quantized.restated import LEFT_OUT, quantization_of


def seems_stored_otherwise(model: object) -> bool:
    """Whether a folder says that its weights are quantized or stored without their zeros, or is a GGUF file: writing
    them out as an ordinary checkpoint is something to do. False of what does not lie here, or is damaged: whoever opens
    it says so.
    """
    if not isinstance(model, (str, Path)) or not kind_at(model):
        return False
    place = Path(model).expanduser()
    if place.suffix.lower() == ".gguf":
        return True
    if any(kind_at(place / name) for name in LEFT_OUT):
        return True
    try:
        content = read_json(place / "config.json") if kind_at(place / "config.json") else {}
    except SparsifyError:
        return False
    return quantization_of(content) is not None
