"""What each layer of a model keeps of past tokens, and how a graph calls it: keys and values, recurrent states, both.

Layers are those of ``transformers.cache_utils``. A graph may hold what these four classes and their two with a sliding
window keep; others (an index of keys, compressed keys) change their sizes by rules of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsify.frontend.text_config import text_config

_KEYS = {"DynamicLayer": "keys and values", "DynamicSlidingWindowLayer": "keys and values"}
_STATES = {"LinearAttentionLayer": "recurrent states"}
_BOTH = {
    "LinearAttentionAndFullAttentionLayer": "keys and values beside recurrent states",
    "LinearAttentionAndSlidingWindowAttentionLayer": "keys and values beside recurrent states",
}
_WORDS = {**_KEYS, **_STATES, **_BOTH, "DummyLayer": "nothing"}


def cache_of(config: Any) -> Any:
    """An empty cache of the layers that ``config`` names. The mask applies a sliding window, the cache keeps every
    token."""
    from transformers import DynamicCache, cache_utils

    cache = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if type(layer).__name__ == "DynamicSlidingWindowLayer":
            cache.layers[number] = cache_utils.DynamicLayer()
        elif type(layer).__name__ == "LinearAttentionAndSlidingWindowAttentionLayer":
            cache.layers[number] = cache_utils.LinearAttentionAndFullAttentionLayer(layer.number_of_states)
    return cache


def layers_of(config: Any) -> Sequence[Any]:
    """The layers of the cache that ``config`` describes; none where it describes no cache."""
    from transformers import DynamicCache

    try:
        return list(DynamicCache(config=config).layers)
    except Exception:  # of a config that is not one of transformers' own
        return []


def recurrent(layer: Any) -> bool:
    return hasattr(layer, "recurrent_states")


def keyed(layer: Any) -> bool:
    return type(layer).__name__ in {**_KEYS, **_BOTH}


def strange(layers: Sequence[Any]) -> bool:
    """Whether one of them keeps what no graph can hold."""
    return any(type(layer).__name__ not in _WORDS for layer in layers)


def described(config: Any, layers: Sequence[Any]) -> str:
    """What the layers keep, in words: ``keys and values (2 layers), recurrent states (6)``."""
    types = getattr(text_config(config), "layer_types", None) or []
    words = [
        _WORDS.get(type(layer).__name__) or (str(types[i]) if i < len(types) else type(layer).__name__)
        for i, layer in enumerate(layers)
    ]
    return ", ".join(f"{word} ({count} layers)" for word, count in Counter(words).items())


def slots(layer: Any, number: int) -> tuple[str, ...]:
    """Names of what a layer that has run keeps, without the word for past or present."""
    found = [f".{number}.key", f".{number}.value"] if keyed(layer) else []
    for at in range(getattr(layer, "number_of_states", 0) if recurrent(layer) else 0):
        more = f".{at}" if at else ""
        found += [f"_conv.{number}{more}"] if layer.conv_states[at] is not None else []
        found += [f"_recurrent.{number}{more}"] if layer.recurrent_states[at] is not None else []
    return tuple(found)


def kept(layer: Any) -> tuple[Tensor, ...]:
    """What a layer that has run keeps, in the order of its :func:`slots`."""
    found = [layer.keys, layer.values] if keyed(layer) else []
    for at in range(getattr(layer, "number_of_states", 0) if recurrent(layer) else 0):
        found += [state for state in (layer.conv_states[at], layer.recurrent_states[at]) if state is not None]
    return tuple(found)


def fill(layer: Any, names: Sequence[str], states: Sequence[Tensor]) -> None:
    """Put ``states``, whose slots are ``names``, into a layer that has kept nothing."""
    for name, state in zip(names, states, strict=True):
        what, _, at = name.partition(".")
        if not what:
            layer.dtype, layer.device = state.dtype, state.device
            setattr(layer, "keys" if name.endswith("key") else "values", state)
            layer.is_initialized = True
            continue
        index = int(at.partition(".")[2] or 0)
        # Layers write their states in place, and a graph may not write its inputs.
        if what == "_conv":
            layer.conv_states[index], layer.conv_kernel_size[index] = state.clone(), state.shape[-1]
            layer.is_conv_states_initialized[index] = True
        else:
            layer.recurrent_states[index] = state.clone()
            layer.is_recurrent_states_initialized[index] = True
        layer.has_previous_state[index] = True
        layer.dtype, layer.device = state.dtype, state.device
