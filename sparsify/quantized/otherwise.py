"""A look at a model's folder, before anything large is imported: do its weights seem to lie there in another form?"""

from __future__ import annotations

from pathlib import Path

from sparsify.errors import SparsifyError
from sparsify.files.reading import kind_at, read_json

# Where a config says how weights are stored, and files beside it in which libraries say it.
_SAYS = ("quantization_config", "compression_config")
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


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
    if any(kind_at(place / name) for name in _FILES):
        return True
    try:
        content = read_json(place / "config.json") if kind_at(place / "config.json") else {}
    except SparsifyError:
        return False
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    return any(isinstance(part.get(key), dict) for part in parts for key in _SAYS)
