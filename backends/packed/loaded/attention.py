"""Attention of one new token a sequence, as decoding asks for it, by our kernel; all else stays transformers'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.runtime import ops
from sparsify.runtime.arguments import is_one_token, wants_gradient

# The implementation whose place is taken, and what says of a module that it is one of a packed model.
_NAME, _OURS = "sdpa", "_sparsify_attends"


def speed_up_attention(model: nn.Module) -> None:
    """Have the attention of ``model`` take :func:`sparsify.runtime.ops.attend` for one token on a CPU, where it would
    take torch's ``scaled_dot_product_attention`` ("sdpa"). Sums are float32: results are at least as near as torch's.

    The implementation keeps its name, which models and transformers' continuous batching ask for. It is that of every
    model in the process, but runs as it was for modules that are not ``model``'s.
    """
    # transformers is still being imported when it finds us.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if not isinstance(ALL_ATTENTION_FUNCTIONS.get(_NAME), _OneToken):
        AttentionInterface.register(_NAME, _OneToken(ALL_ATTENTION_FUNCTIONS[_NAME]))
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            setattr(module, _OURS, True)


class _OneToken:
    """Args:
    other: what is called for all that is not one token on a CPU.
    """

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        simple = position_bias is None and not dropout and kwargs.get("softcap") is None
        if simple and getattr(module, _OURS, False) and _is_one(query, key, value, attention_mask):
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            return ops.attend(query, key, value, attention_mask, scale).transpose(1, 2), None
        given = (attention_mask, dropout, scaling, is_causal, position_bias)
        found: tuple[Tensor, Tensor | None] = self.other(module, query, key, value, *given, **kwargs)
        return found


def _is_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if query.shape[2] != 1 or torch.jit.is_tracing():
        return False
    given = (query, key, value) if mask is None else (query, key, value, mask)
    if any(t.device.type != "cpu" or t.layout is not torch.strided for t in given):
        return False
    return not wants_gradient(*given) and is_one_token(query, key, value, mask)
