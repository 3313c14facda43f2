"""What ``--targets`` names: the linear layers that LoRA is put on.

A word names layers as ``--only`` does (a full name, a module above it, a glob, ``re:…``), or by what a name ends with
at a dot, as peft has it; ``q``, ``k``, ``v`` and ``o`` name attention's projections whatever a family calls them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from sparsify.errors import SpecError, near
from sparsify.prune.names import matches

# What the projections of attention are called: q_proj, query, wq, q_lin, q_a_proj, to_q, …
_ROLES = {
    "q": ("q", "query", "queries", "wq"),
    "k": ("k", "key", "keys", "wk"),
    "v": ("v", "value", "values", "wv"),
    "o": ("o", "out"),
}
# Several in one matrix: qkv_proj, Wqkv, kv_b_proj, in_proj_qkvz; and names that do not say so.
_FUSED = re.compile(r"w?([qkv]{2,3})z?")
_KNOWN_FUSED = {"c_attn": "qkv", "w_pack": "qkv", "att_proj": "qkv"}


def linear_layers(network: Any) -> list[str]:
    """The layers that LoRA may be put on: linear ones, the head left out, as peft's ``all-linear`` has them."""
    from transformers.pytorch_utils import Conv1D

    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    kinds = (nn.Linear, Conv1D)
    return [n for n, module in network.named_modules() if isinstance(module, kinds) and module is not head]


def find_targets(layers: Sequence[str], words: Iterable[str]) -> list[str]:
    """Those of ``layers`` that any of ``words`` names, in the order of the model.

    Raises:
        SpecError: a word that names none, or of a layer that does more than was named.

    >>> find_targets(["h.0.attn.q_proj", "h.0.attn.v_proj", "h.0.mlp.fc"], ["q", "mlp*"])
    ['h.0.attn.q_proj', 'h.0.mlp.fc']
    """
    found: set[str] = set()
    for word in words:
        chosen = [name for name in layers if _named(word, name)] or [n for n in layers if roles_of(n) == {word}]
        if not chosen:
            raise _refuse(word, layers)
        found.update(chosen)
    return [name for name in layers if name in found]


def kinds_of(layers: Iterable[str]) -> list[str]:
    """Names with their numbers left out, each once: what the same layer is called in every block."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in layers))


def roles_of(name: str) -> set[str]:
    """Which of attention's projections a layer is by its name: of ``q``, ``k``, ``v``, ``o``.

    >>> sorted(roles_of("layers.0.query_key_value")), roles_of("attn.q_a_proj"), roles_of("mlp.up_proj")
    (['k', 'q', 'v'], {'q'}, set())
    """
    leaf = name.rpartition(".")[2].lower()
    if leaf in _KNOWN_FUSED:
        return set(_KNOWN_FUSED[leaf])
    roles: set[str] = set()
    for part in leaf.split("_"):
        roles.update(role for role, names in _ROLES.items() if part in names)
        if fused := _FUSED.fullmatch(part):
            roles.update(fused[1])
    return roles


def _named(word: str, name: str) -> bool:
    parts = name.split(".")
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return name.endswith(f".{word}") or any(matches(word, prefix, "--targets") for prefix in above)


def _refuse(word: str, layers: Sequence[str]) -> SpecError:
    fused = [name for name in layers if word in _ROLES and word in roles_of(name)]
    if fused:
        leaf = fused[0].rpartition(".")[2]
        names = {"q": "queries", "k": "keys", "v": "values", "o": "outputs"}
        held = " and ".join(names[role] for role in names if role in roles_of(fused[0]))
        return SpecError(
            f"--targets {word}",
            found=f"{held} in one layer, {fused[0]}",
            do=f"Name it as a whole (--targets {leaf}), or leave --targets out for every linear layer",
        )
    leaves = {name.rpartition(".")[2] for name in layers}
    said = sorted(leaves) if len(leaves) <= 12 else None
    return SpecError(
        f"--targets {word}",
        found="it names no linear layer that LoRA is put on (the head is none)",
        do=f"Name some of {', '.join(said)}" if said else near(word, leaves),
    )
