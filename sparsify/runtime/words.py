"""The words that options over packed weights are made of. Known without torch: a wrong one is refused at once."""

from __future__ import annotations

from typing import Literal, get_args

from sparsify.errors import SpecError

# How a packed matrix is stored (:mod:`sparsify.runtime.layout`), and what may be asked for: ``auto`` takes packed24
# where a weight is 2:4 along its inputs and a bitmask elsewhere. ``dense`` keeps zeros, and is of few bits only.
Layout = Literal["packed24", "bitmask", "dense"]
FEW_LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LAYOUTS: tuple[Layout, ...] = FEW_LAYOUTS[:2]
AskedLayout = Literal["auto", "packed24", "bitmask"]
AskedFewLayout = Literal["auto", "packed24", "bitmask", "dense"]

# What the values of a packed weight are: ``auto`` takes integers where they give the weight to the bit; int8 and int4
# round it; full keeps its dtype; what rounds nothing has two of these. In_features that share a scale of such integers.
# What inputs are multiplied as.
AskedValues = Literal["auto", "int8", "int4", "full"]
FoundValues = Literal["auto", "full"]
AskedGroup = Literal["32", "64", "128", "row"]
Activations = Literal["int8", "float"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)

# Which weights are packed: those that are measured to gain by it, or all that become smaller.
PackingChoice = Literal["measured", "smallest"]

# What a weight on a GPU is kept for: few tokens at a time, many, or twice.
Policy = Literal["decode", "prefill", "both"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


# What a weight on CPUs is kept for: few tokens, packed alone; or twice, with a dense copy beside it for the numbers of
# tokens for which that is measured faster. Many tokens alone would be the dense model.
CopyPolicy = Literal["decode", "both"]
COPY_POLICIES: tuple[CopyPolicy, ...] = get_args(CopyPolicy)


def check_policy(policy: str, asked: str = "") -> None:
    """Refuse what is no policy.

    Args:
        asked: what the user wrote.

    Raises:
        SpecError: it is none.
    """
    if policy not in POLICIES:
        raise SpecError(asked or f"the policy {policy!r}", found="no such policy", do=f"Take {', '.join(POLICIES)}")
