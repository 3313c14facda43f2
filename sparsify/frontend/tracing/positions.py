"""Positions that a model reads off its input: where images lie in a text, tokens are counted in height and width.

The model finds them with loops over the numbers of its inputs, which no graph can hold; they are found beforehand, by
the model's own function, and given to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import CalibrationError, first_line


def with_positions(module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``batch`` with the ``position_ids`` [3, batch, sequence] of a model that counts images in two dimensions; as it
    is where the model does not, or where the batch has no image.

    Raises:
        CalibrationError: the model cannot tell them from the batch.
    """
    found: Any = next((m for m in module.modules() if hasattr(m, "get_rope_index")), None)
    if found is None or "position_ids" in batch or not any(name.endswith("_grid_thw") for name in batch):
        return dict(batch)
    known = inspect.signature(found.get_rope_index).parameters
    try:
        with torch.no_grad():
            positions = found.get_rope_index(**{name: value for name, value in batch.items() if name in known})[0]
    except Exception as error:  # whatever a model's own code raises on inputs that do not fit
        raise CalibrationError(
            f"positions of a batch for {type(module).__name__}",
            found=f"its get_rope_index fails: {first_line(error)}",
            do="Give what the model's processor gives (mm_token_type_ids and image_grid_thw among it), or position_ids",
        ) from error
    return {**batch, "position_ids": positions}
