"""Past tokens that a model would keep and give, which no graph has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def call_arguments(module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``module`` from a batch, without any cache of past tokens.

    A forward that does not name ``use_cache`` is not told: what it hands on may have it already. Its configs say it
    (:func:`without_cache`).
    """
    positional = sorted((k for k in batch if k.isdigit()), key=int)
    kwargs: dict[str, Any] = {k: v for k, v in batch.items() if not k.isdigit()}
    if hasattr(module, "config") and "use_cache" in inspect.signature(module.forward).parameters:
        kwargs.setdefault("use_cache", False)
    return tuple(batch[k] for k in positional), kwargs


@contextmanager
def without_cache(module: nn.Module) -> Iterator[None]:
    """``module`` with every config of its parts saying that past tokens are not kept, and as it was afterwards.

    A model of several models (a vision tower beside a language model) asks the config of the part that keeps them, not
    its own, and not every such model hands the word on.
    """
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    kept = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in kept:
        config.use_cache = False
    try:
        yield
    finally:
        for config in kept:
            config.use_cache = True
