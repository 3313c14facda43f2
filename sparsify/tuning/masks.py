"""Which weights of a model are pruned, and whether they still are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify.analysis.linear import find_sites
from sparsify.errors import VerifyError
from sparsify.ir.program import Program
from sparsify.method.selection import to_hold


def masks_of(program: Program) -> dict[str, Tensor]:
    """Parameter -> True where a linear weight is kept; of those that have zeros, where any was pruned."""
    names = dict.fromkeys(site.parameter for site in find_sites(program)[0])
    return to_hold((name, program.weights.read(name) != 0) for name in names)


def check_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raises:
    VerifyError: a weight that is not zero where it was pruned.
    """
    for name, count in broken_zeros(weights, masks).items():
        raise VerifyError(
            f"tuning {name}",
            found=f"{count} pruned weights are not zero any more",
            do="Report this as a bug; nothing was written",
        )


def broken_zeros(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many pruned entries of each weight are not zero; without those that have none."""
    counts = {name: int(((weights[name] != 0) & ~kept.to(weights[name].device)).sum()) for name, kept in masks.items()}
    return {name: count for name, count in counts.items() if count}
