"""Of a folder's ``sparsify.json``, what is as true of a folder that is made of it by anything but a compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# How a folder holds its numbers, which every backend says of its own folders.
OF_THE_FORM = frozenset({"packed", "not_packed", "onnx"})
# What holds of other numbers too, as long as the zeros are where they were: which they are, by what and on which data,
# and what the folder is beside them. All else was measured of the numbers, or is the words that make them again.
OF_THE_ZEROS = frozenset(
    {"passes", "calibration", "compute_dtype", "versions", "structure", "not_understood", "architecture", "card"}
)


def in_another_form(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What holds of the same numbers, written otherwise."""
    return {key: value for key, value in manifest.items() if key not in OF_THE_FORM}


def with_other_numbers(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What holds of other numbers in the same places."""
    return {key: value for key, value in manifest.items() if key in OF_THE_ZEROS}
