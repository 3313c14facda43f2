"""Where a weight is in its model, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

# ``model.layers.3.mlp.down_proj``: the stack, the block, the kind.
_PLACE = re.compile(r"(?P<stack>.*?)\.?(?<![^.])(?P<block>\d+)\.(?P<kind>.+)")


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
