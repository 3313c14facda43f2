"""What a model must be given beside token ids, as far as its config tells: inputs of the right shapes, all zeros.

They serve to trace a model by (``sparsify inspect``, ``--dry-run``, checks of a written folder). What a config does not
tell is not guessed at: a user's own batches tell it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.frontend.source import Source

# Where nothing says how long a sound is: one second at 16 kHz, or so many frames of it.
_SAMPLES, _FRAMES = 16_000, 128
# Tokens that a decoder reads beside a sound or an image.
_DECODED = 16
_IMAGE, _SOUND, _WAVE = "pixel_values", "input_features", "input_values"


def other_inputs(source: Source, rows: int = 1) -> dict[str, Tensor]:
    """Every input but token ids that the model cannot do without: name to zeros, [rows, …] in the model's dtype.

    Empty for models of text, those with images beside it among them, which run without; and for what is not known.
    """
    config, module = source.config, source.module
    main = getattr(module, "main_input_name", None)
    if not source.is_transformers or main is None:
        return {}
    taken = inspect.signature(module.forward).parameters
    if main == "input_ids":
        # Two encoders side by side, for text and for images or sounds: neither runs alone.
        if not hasattr(module, "get_text_features"):
            return {}
        wanted = [name for name in (_IMAGE, _SOUND, _WAVE) if name in taken][:1]
    else:
        wanted = [main]
    shapes = {name: _shape(name, config) for name in wanted}
    found = {n: torch.zeros(rows, *shape, dtype=source.dtype) for n, shape in shapes.items() if shape is not None}
    if found and main != "input_ids" and "decoder_input_ids" in taken and getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = torch.zeros(rows, _decoded(source), dtype=torch.long)
    return found


def decoder_from_labels(given: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """``decoder_input_ids`` of a batch that brings labels [batch, sequence] in their stead, as transformers makes them
    of labels: moved on by one, behind the token that a decoder starts with. Empty where there is nothing to make.
    """
    config, labels = source.config, given.get("labels")
    if labels is None or "decoder_input_ids" in given or not getattr(config, "is_encoder_decoder", False):
        return {}
    if labels.dim() != 2 or labels.is_floating_point():
        return {}
    start, pad = (getattr(config, f"{name}_token_id", None) or 0 for name in ("decoder_start", "pad"))
    moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return {"decoder_input_ids": moved.masked_fill(moved == -100, pad)}


def _decoded(source: Source) -> int:
    most = _said(source.config, "max_target_positions") or source.context_length or _DECODED
    return min(_DECODED, most)


def _shape(name: str, config: Any) -> tuple[int, ...] | None:
    """The shape of one sample of an input; None where the config does not tell it."""
    if name == _IMAGE:
        return _image(config)
    bands = _said(config, "num_mel_bins")
    if name == _WAVE:
        frames, channels = _said(config, "max_length"), _said(config, "audio_channels")
        if bands and frames:
            return frames, bands
        return (channels, _SAMPLES) if channels else (_SAMPLES,)
    if name != _SOUND:
        return None
    positions, each = _said(config, "max_source_positions"), _said(config, "input_feat_per_channel")
    if each:
        return _FRAMES, each * (_said(config, "input_channels") or 1)
    if bands and positions:
        # A convolution of stride two comes before the positions.
        return bands, 2 * positions
    width = _said(config, "feature_projection_input_dim") or bands
    return (_FRAMES, width) if width else None


def _image(config: Any) -> tuple[int, ...]:
    found = _said(config, "image_size", (int, list, tuple)) or 224
    height, width = found if isinstance(found, (list, tuple)) else (found, found)
    frames = _said(config, "num_frames")
    return (*([frames] if frames else []), _said(config, "num_channels") or 3, height, width)


def _said(config: Any, name: str, kinds: type | tuple[type, ...] = int) -> Any:
    """A field of the config, or of one inside it that is for something else than text."""
    inner = (getattr(config, part, None) for part in ("vision_config", "audio_config", "encoder_config", "encoder"))
    for part in (config, *inner):
        value = getattr(part, name, None)
        if isinstance(value, kinds) and value:
            return value
    return None
