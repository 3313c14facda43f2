"""Where a weight is in its model, by its name; and where a model is that a user gave."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sparsify.errors import SpecError

# ``model.layers.3.mlp.down_proj``: the stack, the block, the kind.
_PLACE = re.compile(r"(?P<stack>.*?)\.?(?<![^.])(?P<block>\d+)\.(?P<kind>.+)")


def folder_of(model: object, asked: str) -> str | Path:
    """``model`` itself, where it names one; the folder of what :func:`sparsify.compile` or a search gave back.

    Raises:
        SpecError: a result that was not written, or something else.
    """
    if isinstance(model, str | Path):
        return model
    if not hasattr(model, "output"):
        raise SpecError(asked, found=f"{type(model).__name__}, which names no model", do="Give a folder's path")
    if model.output is None:
        raise SpecError(asked, found="a result that lies in memory alone", do="Write it first: result.save(folder)")
    return Path(model.output)


def place_of(name: str) -> tuple[str, str, str]:
    """Stack, block and kind of a weight by its name: ``("model.layers", "3", "mlp.down_proj")``; ``("", "", name)`` of
    one that is in no block. Numbers further on (of experts) are ``*``."""
    found = _PLACE.fullmatch(name)
    if found is None:
        return "", "", name
    return found["stack"], found["block"], re.sub(r"(?<![^.])\d+(?![^.])", "*", found["kind"])


def short_names(kinds: Sequence[str]) -> list[str]:
    """What tells ``kinds`` from each other: ``q_proj`` of ``self_attn.q_proj`` where there is but one."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return [own if last.count(own) == 1 else kind for own, kind in zip(last, kinds, strict=True)]
