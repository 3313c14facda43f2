"""Say a model's new widths in its config, by the fields that hold the old ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.errors import BackendError

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEAD_SIZE = ("head_dim", "d_kv")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "moe_intermediate_size")
_WIDTH = ("hidden_size", "n_embd", "d_model")


def new_config(config: Any, widths: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """The fields of a transformers config that change.

    Args:
        widths: (kind, channels before, channels after) of every group that was cut.

    Raises:
        BackendError: widths that differ between layers, or that no field holds.
    """
    text = config.get_text_config()
    held = {k: v for k, v in text.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}
    changes: dict[str, Any] = {}
    for kind, before, after in widths:
        for field, value in _fields(text, held, kind, before, after).items():
            if changes.setdefault(field, value) != value:
                raise BackendError(
                    "writing the smaller model", found=f"layers of different widths, and one {field} for all of them",
                    do="Let every layer be pruned alike (no --ignore or --only that names some)",
                )  # fmt: skip
    return changes


def head_counts(config: Any, before: int) -> list[int]:
    """The counts up to ``before`` that the config's own checks let pass: some want one that divides the hidden size."""
    text = config.get_text_config()
    held = {k: v for k, v in text.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}
    found = []
    for count in range(1, before + 1):
        try:
            type(text).from_dict(text.to_dict() | _fields(text, held, "heads", before, count))
        except Exception:  # (a config's checks raise whatever they like, and mean no)
            continue
        found.append(count)
    return found


def _fields(text: Any, held: dict[str, int], kind: str, before: int, after: int) -> dict[str, Any]:
    if kind == "heads":
        heads = next((f for f in _HEADS if f in held), None)
        groups = next((f for f in _KEY_VALUE_HEADS if f in held), None)
        if heads is None or held[heads] % before:
            raise _unsaid(kind, before)
        found: dict[str, Any] = {heads: held[heads] // before * after}
        if groups is not None:
            found[groups] = after if held[groups] == before else held[groups]
        # What the number of heads gave by division until now.
        size = next((f for f in _HEAD_SIZE if hasattr(text, f) or f == "head_dim"), "head_dim")
        if getattr(text, size, None) is None:
            width = next(held[f] for f in _WIDTH if f in held)
            found[size] = width // held[heads]
        else:
            found[size] = getattr(text, size)
        return found
    names = _WIDTH if kind == "width" else _INNER
    field = next((f for f in names if held.get(f) == before), None)
    if field is None:
        raise _unsaid(kind, before)
    found = {field: after}
    if kind == "width" and getattr(text, "head_dim", None) is None:
        heads = next((f for f in _HEADS if f in held), None)
        if heads is not None:
            found["head_dim"] = before // held[heads]
    return found


def _unsaid(kind: str, before: int) -> BackendError:
    return BackendError(
        "writing the smaller model", found=f"no field of its config that holds {before} {kind}",
        do="Leave them out (--only 'mlp*', say), or cut the graph in Python: sparsify.shrink.shrink",
    )  # fmt: skip
