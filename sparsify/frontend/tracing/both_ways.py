"""Language models that read a prompt in both directions, as PaliGemma's does, and AIMv2's of a text without padding.

transformers 5.24 makes a causal mask for such a model and, outside a trace, leaves it out where attention could say the
same by itself. Their attention does not: without a mask it looks both ways. What a user sees is that, so a trace leaves
the mask out, too. With a mask of padding it depends on the numbers in it, which no graph can follow.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from sparsify.errors import TraceError


def reads_both_ways(module: nn.Module) -> bool:
    """Whether a causal mask that is left out makes attention in ``module`` look both ways."""
    return _means_to(module) or _happens_to(module)


def _means_to(module: nn.Module) -> bool:
    """Whether a config asks for it."""
    return any(
        getattr(part, "is_causal", None) is False
        and hasattr(part, "layer_idx")
        and getattr(config := getattr(part, "config", None), "use_bidirectional_attention", False)
        and getattr(config, "is_causal", True)
        and not _masks_both_ways(type(part))
        for part in module.modules()
    )


def _happens_to(module: nn.Module) -> bool:
    """Whether a model in ``module`` makes a causal mask, which may be left out, for attention that is told nothing else
    and is not causal by itself.
    """
    return any(
        getattr(part, "_supports_sdpa", False)
        and not getattr(getattr(part, "config", None), "use_bidirectional_attention", False)
        and "create_causal_mask(" in (code := _forward_of(type(part)))
        and not any(other in code for other in ("is_causal", "position_bias", "create_bidirectional_mask("))
        and {own.is_causal for own in _own_parts(part) if hasattr(own, "is_causal")} == {False}
        for part in module.modules()
    )


def _forward_of(model: type) -> str:
    """The code of a class's forward; "" where there is none to read."""
    try:
        return inspect.getsource(inspect.unwrap(model.forward))  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return ""


def _own_parts(model: nn.Module) -> Iterator[Any]:
    """The modules in ``model`` that are in no model within it."""
    for part in model.children():
        if not hasattr(part, "get_input_embeddings"):
            yield part
            yield from _own_parts(part)


def _masks_both_ways(attention: type) -> bool:
    """Whether the code around a class of attention makes a mask that itself looks both ways, as Gemma 3's does, which
    is never left out; Gemma's and Gemma 2's make the causal one.
    """
    return hasattr(sys.modules[attention.__module__], "_bidirectional_window_overlay")


def leave_masks_out(stack: ExitStack, module: nn.Module, given: Collection[str] = ()) -> None:
    """While ``stack`` is open, a trace of ``module`` leaves a causal mask out where a run would.

    Args:
        given: names of the inputs of the trace.

    Raises:
        TraceError: then, where that depends on the numbers in an input.
    """
    from transformers import masking_utils

    if not reads_both_ways(module) or "token_type_ids" in given:
        # With token types there always is a mask, which says it all.
        return

    type_ids = _means_to(module)

    def left_out(
        padding_mask: Tensor | None, q_length: int, kv_length: int, q_offset: Any, kv_offset: Any, local: Any = None
    ) -> bool:
        if padding_mask is not None:
            raise _unknown(module, "the attention mask", type_ids)
        return (local is None or kv_length < local) and (q_length == 1 or q_length == kv_length)

    def packed(position_ids: Tensor) -> None:
        # The model's own positions are of one sequence each.
        if "position_ids" in given:
            raise _unknown(module, "position_ids", type_ids)

    for name, function in {"_ignore_causal_mask_sdpa": left_out, "find_packed_sequence_indices": packed}.items():
        if hasattr(masking_utils, name):
            stack.enter_context(patch.object(masking_utils, name, function))


def _unknown(module: nn.Module, where: str, type_ids: bool) -> TraceError:
    return TraceError(
        f"capturing {type(module).__name__}",
        found=f"whether it reads both ways depends on the numbers in {where}",
        do="Give token_type_ids beside it, as its processor does (zeros for a prompt)"
        if type_ids
        else f"Give rows of one length, without {where}",
    )
