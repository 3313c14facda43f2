"""The part of a config that describes a language model."""

from __future__ import annotations

from typing import Any


def text_config(config: Any, **part: bool) -> Any:
    """The config of the language model in ``config``; ``config`` itself where it is none of several models.

    Args:
        part: ``encoder`` or ``decoder``, where both read text and one is meant.
    """
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config(**part)
    except ValueError:  # several that could be it
        return config
