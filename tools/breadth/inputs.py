"""Inputs for a tiny model: sets of them, the likeliest first, from its class's signature and its config's sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from breadth.exceptions import IMAGE_TOKENS
from breadth.given import GIVEN, draw
from breadth.shrink import FIRST_ID, LAST_ID

Batch = dict[str, Tensor]
ROWS, LENGTH = 2, 16
# What a mask, or a table that lies beside the ids, is made of.
_BESIDE = (
    "attention_mask",
    "pixel_mask",
    "bbox",
    "token_type_ids",
    "langs",
    "decoder_input_ids",
    "pixel_attention_mask",
)


class Inputs:
    """Draws batches for ``model``; ``seed`` chooses their numbers, never their shapes."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.names = inspect.signature(model.forward).parameters

    def sets(self) -> Iterator[tuple[str, ...]]:
        """Names of inputs, the likeliest set first."""
        main = self.model.main_input_name
        mains = tuple(main) if isinstance(main, (list, tuple)) else (main,)
        kind = self.config.model_type
        if kind in GIVEN:
            yield tuple(GIVEN[kind])
            return
        # Of a class that says nothing of its main input the forward does.
        first = tuple(m for m in mains if m in self.names)
        if getattr(self.config, "is_encoder_decoder", False) and "decoder_input_ids" in self.names:
            yield (*first, "decoder_input_ids")
        needed = tuple(
            n for n, p in self.names.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        )
        yield tuple(dict.fromkeys((*first, *needed)))
        if needed:
            yield needed
        if "input_ids" in self.names:
            yield tuple(dict.fromkeys(("input_ids", *needed)))
        senses = [
            n
            for n in ("input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values")
            if n in self.names
        ]
        if len(senses) > 1:
            yield tuple(dict.fromkeys((*senses[:2], *needed)))
        base = tuple(dict.fromkeys((*first, *needed)))
        yield tuple(dict.fromkeys((*base, *(n for n in _BESIDE if n in self.names))))
        yield tuple(dict.fromkeys((*senses, *base, *(n for n in _BESIDE if n in self.names))))
        yield tuple(dict.fromkeys((*base, *(n for n in ("decoder_input_ids",) if n in self.names))))

    def batches(self, names: tuple[str, ...], seed: int) -> Iterator[Batch]:
        """Each way in which inputs of these names may be shaped."""
        for way in range(4):
            generator = torch.Generator().manual_seed(seed)
            try:
                batch = {name: self.one(name, way, generator) for name in names}
            except KeyError:
                return
            yield batch

    def one(self, name: str, way: int, generator: torch.Generator) -> Tensor:
        """Raises:
        KeyError: no such input is known.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        high = min(LAST_ID, self._size("vocab_size", default=LAST_ID))
        low = FIRST_ID if high > 2 * FIRST_ID else 0
        if given := GIVEN.get(self.config.model_type):
            found = draw(given[name], low, high, generator)
            return self._with_images(found) if name == "input_ids" else found
        if name in ("input_ids", "decoder_input_ids", "text_input_ids", "labels", "encoder_input_ids"):
            books = self._size("num_codebooks", "n_codebooks", "num_channels_out", default=0)
            shape = (
                (ROWS, LENGTH) if way < 2 else (ROWS, LENGTH, books or 2) if way == 2 else (ROWS, books or 2, LENGTH)
            )
            ids = torch.randint(low, high, shape, generator=generator)
            return self._with_images(ids) if name == "input_ids" else ids
        if name in ("attention_mask", "pixel_mask", "pixel_attention_mask", "input_features_mask", "padding_mask"):
            if name.startswith("pixel"):
                side = self._side()
                return torch.ones(ROWS, side, side, dtype=torch.long)
            return torch.ones(ROWS, LENGTH, dtype=torch.long)
        if name in ("token_type_ids", "langs"):
            return torch.zeros(ROWS, LENGTH, dtype=torch.long)
        if name == "bbox":
            return torch.tensor([1, 2, 5, 7]).expand(ROWS, LENGTH, 4).contiguous()
        if name in ("pixel_values", "pixel_values_videos"):
            channels, side = self._size("num_channels", "in_channels", "in_chans", default=3), self._side()
            frames = self._size("num_frames", "frames_per_clip", default=2)
            if (way == 0) != (name.endswith("videos")):
                return normal(ROWS, channels, side, side)
            if way == 1 or name.endswith("videos"):
                return normal(ROWS, frames, channels, side, side)
            patch = self._size("patch_size", default=8)
            across = side // patch
            return normal(ROWS, across * across, channels * patch * patch)
        if name == "input_features":
            mels = self._size(
                "num_mel_bins",
                "feature_size",
                "n_mels",
                "feature_projection_input_dim",
                "input_feat_per_channel",
                "num_mel_features",
                "input_dim",
                "input_feat_size",
                default=16,
            )
            positions = self._size("max_source_positions", default=16)
            return (
                normal(ROWS, mels, 2 * positions)
                if way == 0
                else normal(ROWS, 64, mels)
                if way == 1
                else normal(ROWS, 1, 64, mels)
                if way == 2
                else normal(ROWS, 1, 2 * positions, mels)
            )
        if name in ("input_values", "waveform", "raw_speech", "audio_values"):
            mels, long = self._size("num_mel_bins", default=16), self._size("max_length", default=64)
            return (
                normal(ROWS, 2000)
                if way == 0
                else normal(ROWS, long, mels)
                if way == 1
                else normal(ROWS, 1, 2000)
                if way == 2
                else normal(ROWS, 3200)
            )
        if name == "hidden_states" and "grid_thw" in self.names:
            patch, deep = self._size("patch_size", default=8), self._size("temporal_patch_size", default=1)
            channels = self._size("in_channels", "num_channels", default=3)
            return normal(16, channels * deep * patch * patch)
        if name in (
            "hidden_states",
            "inputs_embeds",
            "encoder_hidden_states",
            "context",
            "image_embeds",
            "query_embeds",
            "inputs",
        ):
            width = self._size("hidden_size", "d_model", "embed_dim", "hidden_dim", "dim", "input_size", default=32)
            return normal(ROWS, LENGTH, width) if way != 1 else normal(ROWS, width, LENGTH)
        if name in ("grid_thw", "image_grid_thw"):
            return torch.tensor([[1, 4, 4]])
        if name in ("past_values", "past_observed_mask", "past_time_features", "future_values"):
            long = self._size("context_length", default=16) + max(self._lags(), default=0)
            if name == "past_time_features":
                return normal(ROWS, long, self._size("num_time_features", default=0))
            wide = self._size("num_input_channels", "input_size", default=1)
            shape = (ROWS, long, wide) if way == 1 or wide > 1 else (ROWS, long)
            return torch.ones(*shape) if "mask" in name else normal(*shape).abs()
        if name in ("past_values_mask",):
            return torch.ones(ROWS, LENGTH)
        raise KeyError(name)

    def _with_images(self, ids: Tensor) -> Tensor:
        count = IMAGE_TOKENS.get(self.config.model_type, 0)
        named = ("image_token_id", "image_token_index", "audio_token_id", "video_token_id")
        ids[:, :count] = self._size(*named, default=0)
        return ids

    def _lags(self) -> list[int]:
        return list(getattr(self.config, "lags_sequence", None) or [])

    def _side(self) -> int:
        usual = 64 if getattr(self.config, "depths", None) else 32
        return self._size("image_size", "img_size", "input_size", default=usual)

    def _size(self, *names: str, default: int) -> int:
        """The first of these fields, of the config or of what it consists of."""
        todo = [self.config]
        while todo:
            config = todo.pop(0)
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
            todo += [v for v in vars(config).values() if hasattr(v, "to_dict")]
        return default
