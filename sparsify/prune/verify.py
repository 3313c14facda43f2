"""Checks after every prune: a pass that breaks its promise is stopped before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.errors import VerifyError
from sparsify.method.weight_pass import MatrixPass, Pruned
from sparsify.tensors import all_finite, zeroed


def verify_pruned(name: str, weight_pass: MatrixPass, before: Tensor, pruned: Pruned) -> None:
    """Check one matrix [out_features, in_features] against what ``weight_pass`` promises.

    Raises:
        VerifyError: shapes disagree, a masked weight is not zero, the pattern does not hold, a kept weight moved
            although the pass promises that it does not, or a weight is not finite.
    """

    def fail(found: str) -> VerifyError:
        return VerifyError(f"{weight_pass.name} on {name}", found=found, do="Report this as a bug in the pass")

    weight, mask = pruned.weight, pruned.mask
    if weight.shape != before.shape or mask.shape != before.shape:
        raise fail(f"shape {tuple(weight.shape)} for a weight of {tuple(before.shape)}")
    if weight_pass.keeps_weights:
        # The weight before was finite and the mask is zero in the result: one comparison says it all.
        if not torch.equal(weight, zeroed(before, mask)):
            raise fail(_difference(weight, before, mask))
    elif not all_finite(weight):
        raise fail("a weight that is NaN or infinite")
    elif bool(weight[mask].any()):
        raise fail("a pruned weight that is not zero")
    if broken := weight_pass.broken(weight):
        raise fail(broken)


def _difference(weight: Tensor, before: Tensor, mask: Tensor) -> str:
    if not all_finite(weight):
        return "a weight that is NaN or infinite"
    if bool(weight[mask].any()):
        return "a pruned weight that is not zero"
    return f"a kept weight that changed, {int((weight != before)[~mask].sum())} in all"
