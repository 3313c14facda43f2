"""Say a model's new widths in its config: which of its fields hold the old ones is found by building the model anew."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from sparsify.analysis.dimensions.groups import Group
from sparsify.errors import BackendError
from sparsify.frontend.skeleton import construct
from sparsify.frontend.source import Source
from sparsify.host import quiet

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEAD_SIZE = ("head_dim", "d_kv")
# Tried first, in this order; then every other field that holds the number.
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "moe_intermediate_size")
_WIDTH = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class Said:
    """A width that a config can say: how many channels stay, the fields that say it, and why it is not what was asked
    for (None where it is)."""

    left: int
    fields: Mapping[str, Any]
    reason: str | None


class Widths:
    """What of a model's widths its config can say."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.text = source.config.get_text_config()
        held = self.text.to_dict()
        self.held = {k: v for k, v in held.items() if isinstance(v, int) and not isinstance(v, bool)}
        self.unset = [k for k, v in held.items() if v is None]
        self._found: dict[tuple[object, ...], Said] = {}

    def nearest(self, group: Group, kind: str, left: int) -> Said:
        """What the config can say that is as near to ``left`` of the group's free channels as may be."""
        member = group.members[0]
        key = (kind, group.channels, len(group.free), left, re.sub(r"\d+", "*", member.parameter), member.axis)
        if key not in self._found:
            self._found[key] = self._search(group, kind, left)
        return self._found[key]

    def _search(self, group: Group, kind: str, left: int) -> Said:
        before = len(group.free)
        counts = sorted(range(1, before), key=lambda n: (abs(n - left), -n)) if kind == "heads" else [left]
        for count in counts:
            if abs(count - left) >= abs(before - left):
                break
            for changes in self._candidates(kind, before, count):
                if self._builds(group, changes, count):
                    why = f"{count} {kind} and not {left}: nearest that the config takes"
                    return Said(count, changes, None if count == left else why)
        return Said(before, {}, f"the model's config cannot say {left} of its {before} {kind}")

    def _candidates(self, kind: str, before: int, after: int) -> Iterator[dict[str, Any]]:
        if kind == "heads":
            yield from self._head_fields(before, after)
            return
        first = _WIDTH if kind == "width" else _INNER
        known = [f for f in first if self.held.get(f) == before or f in self.unset]
        others = [f for f, v in self.held.items() if v == before and f not in known]
        extra = {}
        if kind == "width" and getattr(self.text, "head_dim", None) is None:
            heads = next((f for f in _HEADS if f in self.held), None)
            extra = {} if heads is None else {"head_dim": before // self.held[heads]}
        for field in [*known, *others]:
            if extra:
                yield {field: after, **extra}
            yield {field: after}

    def _head_fields(self, before: int, after: int) -> Iterator[dict[str, Any]]:
        heads = next((f for f in _HEADS if f in self.held), None)
        if heads is None or self.held[heads] % before:
            return
        changes = {heads: self.held[heads] // before * after}
        groups = next((f for f in _KEY_VALUE_HEADS if f in self.held), None)
        if groups is not None and self.held[groups] == before:
            changes[groups] = after
        yield changes
        # What a division by the number of heads gave until now is said from here on.
        width = next((self.held[f] for f in _WIDTH if f in self.held), None)
        for size in _HEAD_SIZE:
            own = getattr(self.text, size, None)
            if own is None and width is not None:
                own = width // self.held[heads]
            if own is not None:
                yield changes | {size: own}

    def _builds(self, group: Group, changes: Mapping[str, Any], count: int) -> bool:
        """Whether a model of that config has the group's parameters as they will be."""
        model = self.build(changes)
        if model is None:
            return False
        held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        stay = numpy.concatenate([numpy.flatnonzero(group.pinned), group.free[:count]])
        for member in group.members:
            size = int(numpy.isin(member.channel, stay).sum())
            if member.parameter not in held or held[member.parameter].shape[member.axis] != size:
                return False
        return True

    def build(self, changes: Mapping[str, Any]) -> nn.Module | None:
        """The model of the changed config, without memory; None where the config or the model refuses."""
        # transformers reports refusals as errors, which these are not.
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with quiet(), torch.device("meta"):
                return construct(changed(self.source.config, changes), self.source.trust_remote_code, torch.float32)
        except Exception:  # (configs and constructors raise whatever they like, and mean no)
            return None
        finally:
            logging.disable(before)


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of ``config`` that says other widths.

    Raises:
        Exception: whatever the config's own checks raise.
    """
    result = copy.deepcopy(config)
    text = result.get_text_config()
    new = type(text).from_dict(text.to_dict() | dict(changes))
    if text is result:
        new.architectures = config.architectures
        return new
    setattr(result, next(k for k, v in vars(result).items() if v is text), new)
    return result


def together(every: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of all groups as one.

    Raises:
        BackendError: two groups want other values of one field.
    """
    merged: dict[str, Any] = {}
    for changes in every:
        for field, value in changes.items():
            if merged.setdefault(field, value) != value:
                raise BackendError(
                    "writing the smaller model",
                    found=f"layers of different widths, {field} of {merged[field]} and of {value}",
                    do="Let every layer be pruned alike (no --ignore or --only that names some)",
                )
    return merged
