"""What layers are called in tables: the same in every block."""

from __future__ import annotations

from collections.abc import Sequence


def kind_of(name: str) -> str:
    """What a layer is called in every block: ``self_attn.q_proj``."""
    parts = name.removesuffix(".weight").split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def siblings_label(names: Sequence[str]) -> str:
    """What layers of one product are called together: ``self_attn.q/k/v_proj``."""
    kinds = [kind_of(name) for name in names]
    parents, leaves = {kind.rpartition(".")[0] for kind in kinds}, [kind.rpartition(".")[2] for kind in kinds]
    ends = {leaf.rpartition("_")[2] for leaf in leaves}
    if len(kinds) == 1 or len(parents) > 1:
        return " + ".join(kinds)
    end = f"_{ends.pop()}" if len(ends) == 1 and all("_" in leaf for leaf in leaves) else ""
    parent = f"{parent}." if (parent := parents.pop()) else ""
    return parent + "/".join(leaf.removesuffix(end) for leaf in leaves) + end
