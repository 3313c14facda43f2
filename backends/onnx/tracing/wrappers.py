"""Models behind flat forwards: a dictionary of tensors and a list of states in, tensors and states out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from sparsify.backends.onnx.tracing.layers import cache_of, fill, kept
from sparsify.frontend.tracing.caches import call_arguments, without_cache
from sparsify.frontend.tracing.literal import literal

# Of every layer: keys and values, its convolution's and its recurrent state, or all of them.
States = list[tuple[Tensor, ...]]

# Before transformers 5.24 key-value caches and recurrent states had a name each.
CACHES = ("cache", "past_key_values", "cache_params")


def cache_argument(model: nn.Module) -> str | None:
    """The name under which ``model`` takes its cache, and gives it back."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in parameters), None)


class Cached(nn.Module):
    """A model that takes and gives a cache, under the name that its forward has for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def run(self, cache: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Logits, and the cache as the model leaves it; None makes one of its own."""
        name = cache_argument(self.model)
        out = self.model(**inputs, **{str(name): cache}, use_cache=True)
        given = getattr(out, str(name), None)
        # RecurrentGemma gives none back, and has written into the one that it was given.
        return out.logits, cache if given is None else given


class Decoder(Cached):
    """Keys and values of every layer are the states."""

    def forward(self, inputs: dict[str, Tensor], states: States) -> tuple[Any, States]:
        from transformers import DynamicCache

        # Made without the config: the mask then applies a sliding window, and the cache keeps every token.
        cache = DynamicCache([tuple(pair) for pair in states])
        logits, cache = self.run(cache, inputs)
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


class Step(Cached):
    """One token of a model with recurrent states, of some layers or of all.

    ``slots`` are the names of each layer's states (see :mod:`sparsify.backends.onnx.tracing.layers`).
    """

    def __init__(self, model: nn.Module, slots: Sequence[tuple[str, ...]]) -> None:
        super().__init__(model)
        self.slots = list(slots)

    def forward(self, inputs: dict[str, Tensor], states: States) -> tuple[Any, States]:
        model: Any = self.model
        cache = cache_of(model.config)
        for layer, names, tensors in zip(cache.layers, self.slots, states, strict=True):
            fill(layer, names, tensors)
        mask, keyed = inputs["attention_mask"], any(name.endswith(".key") for names in self.slots for name in names)
        # Without keys there is nothing for the model to mask.
        given = inputs if keyed else {"input_ids": inputs["input_ids"]}
        logits, cache = self.run(cache, given)
        mask = mask[:, -1:] if keyed else mask
        # A padded row keeps the state of one that has seen nothing, which is what the padded prefill computes.
        return logits, [
            tuple(
                state if name.startswith(".") else _masked(state, mask)
                for name, state in zip(names, kept(layer), strict=True)
            )
            for layer, names in zip(cache.layers, self.slots, strict=True)
        ]


def _masked(state: Tensor, mask: Tensor) -> Tensor:
    return state * mask.reshape(-1, *[1] * (state.dim() - 1)).to(state.dtype)


class Plain(nn.Module):
    """A model without states.

    ``fixed`` are inputs whose numbers it has anyway; ``buffers`` what its buffers hold, where sizes follow from them.
    """

    def __init__(
        self,
        model: nn.Module,
        positional: bool,
        fixed: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.positional = model, positional
        self.fixed, self.held = dict(fixed or {}), buffers

    def forward(self, inputs: dict[str, Tensor], states: States) -> tuple[Any, States]:
        return tuple(self.outputs(inputs).values()), []

    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model makes of ``inputs``, by name."""
        if self.positional:
            return named_tensors(self.model(*inputs.values()))
        with without_cache(self.model):
            _, named = call_arguments(self.model, inputs)
            with literal(self.model, self.fixed, self.held) if self.fixed or self.held else nullcontext():
                return named_tensors(self.model(**named))


def named_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output that a deployed graph gives, by name; those of a tuple are ``NAME.0`` and on."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        names = ("logits", "last_hidden_state", "pooler_output")
        flat = {name: _flat(name, output[name]) for name in output}
        named = [flat[name] for name in names if flat.get(name)]
        named = named or [found for name, found in flat.items() if isinstance(output[name], Tensor)] or [*flat.values()]
        return {name: tensor for found in named for name, tensor in found.items()}
    return {f"output_{i}": value for i, value in enumerate(output) if isinstance(value, Tensor)}


def _flat(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, (tuple, list)) and all(isinstance(each, Tensor) for each in value):
        return {f"{name}.{i}": each for i, each in enumerate(value)}
    return {}
