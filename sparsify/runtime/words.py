"""The words that options over packed weights are made of. Known without torch: a wrong one is refused at once."""

from __future__ import annotations

from typing import Literal, get_args

from sparsify.errors import SpecError

# How a packed matrix is stored (:mod:`sparsify.runtime.layout`), and what may be asked for: ``auto`` takes packed24
# where a weight is 2:4 along its inputs and a bitmask elsewhere.
Layout = Literal["packed24", "bitmask"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
AskedLayout = Literal["auto", "packed24", "bitmask"]

# Which weights are packed: those that are measured to gain by it, or all that become smaller.
PackingChoice = Literal["measured", "smallest"]

# What a weight on a GPU is kept for: few tokens at a time, many, or twice.
Policy = Literal["decode", "prefill", "both"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def check_policy(policy: str, asked: str = "") -> None:
    """Refuse what is no policy.

    Args:
        asked: what the user wrote.

    Raises:
        SpecError: it is none.
    """
    if policy not in POLICIES:
        raise SpecError(asked or f"the policy {policy!r}", found="no such policy", do=f"Take {', '.join(POLICIES)}")
