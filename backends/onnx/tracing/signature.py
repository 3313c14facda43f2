"""What a model's forward takes, and what of it a deployed graph has no use for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection

from torch import nn

# Targets, what stands in for ids, caches, parts of a model's own results, and what every model makes of its ids itself.
_NO_INPUT = re.compile(
    r"labels?|.*_labels?|(start|end)_positions|.*embeds|past_.*|cache.*|.*head_mask|.*position_ids|encoder_.*"
    r"|bool_masked_pos|mems|logits_to_keep|output_.*|rope_deltas|num_items_in_batch"
)
# Images, sound, and what says where these are.
_MEDIA = re.compile(
    r".*(pixel|image|video|audio|vision|grid_thw|aspect_ratio|mm_token|tile).*|input_(features|values)"
    r"|feature_attention_mask|second_per_grid_ts|cross_attention_mask|input_modes|speech.*"
)


def tensor_inputs(module: nn.Module) -> list[str]:
    """Names of the tensors that ``module`` reads, in the order of its forward."""
    parameters = inspect.signature(module.forward).parameters.values()
    tensors = [p.name for p in parameters if "Tensor" in str(p.annotation)]
    return [name for name in tensors if not _NO_INPUT.fullmatch(name)]


def missing(module: nn.Module, given: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ``module`` could read and ``given`` has not: inputs that stay at their defaults, and media beside text."""
    left = [name for name in tensor_inputs(module) if name not in given]
    media = tuple(name for name in left if _MEDIA.fullmatch(name)) if "input_ids" in given else ()
    # What a model with images says of its tokens beyond their ids says where the images are.
    beside = {"token_type_ids"} if media else set()
    return tuple(name for name in left if name not in media and name not in beside), media
