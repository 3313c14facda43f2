"""Experts that a model runs one by one, each on as many tokens as chose it, which no graph of fixed shapes can hold.

transformers runs most of its experts by a grouped product, which a graph has. Where it would loop all the same, it is
told to take that product; where it has none, every expert runs on all tokens, with zeros in the place of those that
did not choose it: they add nothing to what it gives, nor to the statistics of what its layers are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.frontend.tracing.literal import running_as

# Classes of transformers 5.24 that hold experts by name, expert_0 and so on, and loop over those that are chosen.
_LOOPING = ("SwitchTransformersExperts",)


@contextmanager
def experts_at_once(module: nn.Module) -> Iterator[None]:
    """While it is open, the experts of ``module`` run on tensors whose shapes do not depend on who was chosen."""
    with ExitStack() as stack:
        for part in module.modules():
            if type(part).__name__ in _LOOPING:
                stack.enter_context(running_as(part, _everywhere(part)))
        stack.enter_context(_grouped(module))
        yield


@contextmanager
def _grouped(module: nn.Module) -> Iterator[None]:
    model: Any = module
    can = getattr(model, "_can_set_experts_implementation", bool)()
    before = model.get_experts_implementation() if can else {}
    if "eager" not in before.values():
        yield
        return
    model.set_experts_implementation({name: "grouped_mm" if way == "eager" else way for name, way in before.items()})
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _everywhere(part: nn.Module) -> Callable[..., Tensor]:
    experts: Any = part

    def run(_: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """``selected_experts``: [tokens, choices, experts], nothing or one; ``routing_weights``: [tokens, choices]."""
        tokens, choices, count = selected_experts.shape
        rows = hidden_states[:, None].expand(tokens, choices, -1).reshape(tokens * choices, -1)
        found = torch.zeros_like(hidden_states)
        for number in range(count):
            chosen = (selected_experts[..., number] != 0).reshape(-1, 1).to(hidden_states.dtype)
            expert = experts[f"expert_{number}"]
            with ExitStack() as stack:
                for layer in expert.modules():
                    if isinstance(layer, nn.Linear):
                        hook = layer.register_forward_pre_hook(lambda _, args, own=chosen: (args[0] * own, *args[1:]))
                        stack.callback(hook.remove)
                given = expert(rows) * chosen * routing_weights.reshape(-1, 1)
            found = found + given.reshape(tokens, choices, -1).sum(1).to(hidden_states.dtype)
        return found

    return run
