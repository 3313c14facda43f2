"""Say a model's new widths in its config: which of its fields hold the old ones is found by building the model anew."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from sparsify.analysis.dimensions.groups import Group
from sparsify.errors import BackendError
from sparsify.frontend.skeleton import construct
from sparsify.frontend.source import Source
from sparsify.frontend.text_config import text_config
from sparsify.host import quiet

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEAD_SIZE = ("head_dim", "d_kv")
# Tried first, in this order; then every other field that holds the number.
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "moe_intermediate_size")
_WIDTH = ("hidden_size", "n_embd", "d_model")

# (parameter, axis) of dimensions.
Peers = Collection[tuple[str, int]]


@dataclass(frozen=True)
class Said:
    """A width that a config can say: how many channels stay, the fields that say it, and why it is not what was asked
    for (None where it is)."""

    left: int
    fields: Mapping[str, Any]
    reason: str | None


@dataclass(frozen=True)
class Part:
    """A config, or one of the configs inside it: a model of several models has one for each.

    Attributes:
        prefix: what its fields are called by here: "" for that of the language model and of a model that is one,
            "vision_config." for another inside.
        held: its whole numbers. unset: fields that are there and say nothing.
    """

    prefix: str
    config: Any
    held: Mapping[str, int]
    unset: Sequence[str]


class Widths:
    """What of a model's widths its config can say."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config = copy.copy(source.config)
        # A model in memory that was never saved has no name in its config.
        self.config.architectures = source.config.architectures or [type(source.module).__name__]
        self.text = text_config(source.config)
        self.parts = [_part(prefix, config) for prefix, config in _configs(source.config)]
        self.held = self.parts[0].held
        self._shapes = {n: tuple(p.shape) for n, p in source.module.named_parameters(remove_duplicate=False)}
        self._found: dict[tuple[object, ...], Said] = {}

    def nearest(self, group: Group, kind: str, left: int, alike: Peers) -> Said:
        """What the config can say that is as near to ``left`` of the group's free channels as may be.

        Args:
            alike: dimensions that may shrink by the same fields: those of groups of its kind. No other may.
        """
        member = group.members[0]
        key = (kind, group.channels, len(group.free), left, re.sub(r"\d+", "*", member.parameter), member.axis)
        if key not in self._found:
            self._found[key] = self._search(group, kind, left, alike)
        return self._found[key]

    def _search(self, group: Group, kind: str, left: int, alike: Peers) -> Said:
        before = len(group.free)
        counts = sorted(range(1, before), key=lambda n: (abs(n - left), -n)) if kind == "heads" else [left]
        for count in counts:
            if abs(count - left) >= abs(before - left):
                break
            for changes in self._candidates(kind, before, count):
                if self._builds(group, changes, count, alike):
                    why = f"{count} {kind} and not {left}: nearest that the config takes"
                    return Said(count, changes, None if count == left else why)
        return Said(before, {}, f"the model's config cannot say {left} of its {before} {kind}")

    def _candidates(self, kind: str, before: int, after: int) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            found = _head_fields(part, before, after) if kind == "heads" else _width_fields(part, kind, before, after)
            for changes in found:
                yield {f"{part.prefix}{field}": value for field, value in changes.items()}

    def _builds(self, group: Group, changes: Mapping[str, Any], count: int, alike: Peers) -> bool:
        """Whether a model of that config has the group's parameters as they will be, and all others as they are."""
        model = self.build(changes)
        if model is None:
            return False
        own = self.source.weights.canonical
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if parameters.keys() != self._shapes.keys():
            return False
        held = parameters | dict(model.named_buffers())
        stay = numpy.concatenate([numpy.flatnonzero(group.pinned), group.free[:count]])
        for member in group.members:
            size = int(numpy.isin(member.channel, stay).sum())
            if member.parameter not in held or held[member.parameter].shape[member.axis] != size:
                return False
        return all(
            len(shape) == parameters[name].dim()
            and all((own(name), axis) in alike for axis, n in enumerate(parameters[name].shape) if n != shape[axis])
            for name, shape in self._shapes.items()
        )

    def build(self, changes: Mapping[str, Any]) -> nn.Module | None:
        """The model of the changed config, without memory; None where the config or the model refuses."""
        # transformers reports refusals as errors, which these are not.
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with quiet(), torch.device("meta"):
                return construct(changed(self.config, changes), self.source.trust_remote_code, torch.float32)
        except Exception:  # (configs and constructors raise whatever they like, and mean no)
            return None
        finally:
            logging.disable(before)


def _part(prefix: str, config: Any) -> Part:
    content = config.to_dict()
    held = {k: v for k, v in content.items() if isinstance(v, int) and not isinstance(v, bool)}
    return Part(prefix, config, held, [k for k, v in content.items() if v is None])


def _width_fields(part: Part, kind: str, before: int, after: int) -> Iterator[dict[str, Any]]:
    first = _WIDTH if kind == "width" else _INNER
    known = [f for f in first if part.held.get(f) == before or f in part.unset]
    others = [f for f, v in part.held.items() if v == before and f not in known]
    extra = {}
    if kind == "width" and _said(part.config, "head_dim") is None:
        heads = next((f for f in _HEADS if f in part.held), None)
        extra = {} if heads is None else {"head_dim": before // part.held[heads]}
    for field in [*known, *others]:
        if extra:
            yield {field: after, **extra}
        yield {field: after}
    if kind == "channels":
        # Several of the width that the config says, side by side: the shared experts of DeepSeek.
        for field in first:
            each = part.held.get(field, 0)
            if 0 < each < before and not before % each and not each * after % before:
                yield {field: each * after // before}


def _head_fields(part: Part, before: int, after: int) -> Iterator[dict[str, Any]]:
    heads = next((f for f in _HEADS if f in part.held), None)
    if heads is None or part.held[heads] % before:
        return
    changes = {heads: part.held[heads] // before * after}
    groups = next((f for f in _KEY_VALUE_HEADS if f in part.held), None)
    if groups is not None and part.held[groups] == before:
        changes[groups] = after
    yield changes
    # What a division by the number of heads gave until now is said from here on.
    width = next((part.held[f] for f in _WIDTH if f in part.held), None)
    for size in _HEAD_SIZE:
        own = _said(part.config, size)
        if own is None and width is not None:
            own = width // part.held[heads]
        if own is not None:
            yield changes | {size: own}


def _said(config: Any, field: str) -> Any:
    """What ``config`` says as a whole; None of what differs from layer to layer, which some refuse to say."""
    try:
        return getattr(config, field, None)
    except Exception:  # (a RuntimeError of transformers that older versions of it do not have)
        return None


def _inside(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every config inside, by its dotted path."""
    for name, value in vars(config).items():
        if not name.startswith("_") and hasattr(value, "get_text_config"):
            yield f"{path}{name}", value
            yield from _inside(value, f"{path}{name}.")


def _configs(config: Any) -> list[tuple[str, Any]]:
    """Prefix and config: that of the language model first, then every other in ``config``."""
    text = text_config(config)
    return [("", text), *((f"{path}.", inner) for path, inner in _inside(config) if inner is not text)]


def text_path(config: Any) -> list[str]:
    """Where in a config.json the language model's own config is: a list of keys, empty where it is the whole."""
    text = text_config(config)
    return next((path.split(".") for path, inner in _inside(config) if inner is text), [])


def by_part(config: Any, changes: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Fields as :class:`Widths` calls them, by where their config is in a config.json."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for field, value in changes.items():
        *path, name = field.split(".")
        found.setdefault(tuple(path or text_path(config)), {})[name] = value
    return found


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of ``config`` that says other widths.

    Raises:
        Exception: whatever the config's own checks raise.
    """
    result = copy.deepcopy(config)
    for path, fields in by_part(config, changes).items():
        owner = result
        for name in path[:-1]:
            owner = getattr(owner, name)
        old = getattr(owner, path[-1]) if path else result
        new = type(old).from_dict(old.to_dict() | fields)
        if path:
            setattr(owner, path[-1], new)
        else:
            new.architectures = config.architectures
            result = new
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
