"""The sweep of optimal brain surgery over columns: prune one, compensate on those to its right, go on.

Source: SparseGPT (2301.00774), algorithm 1; algorithms.md, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Chooser = Callable[[Tensor, int], Tensor]


def sweep(weight: Tensor, factor: Tensor, choose: Chooser, width: int) -> tuple[Tensor, Tensor]:
    """Prune the columns of ``weight`` from left to right.

    Column j loses e_j = w_j / U_jj where its mask is set, and every column k to the right is compensated by
    −e_j·U_jk. Updates wait until they are needed and are then applied as one matrix product: columns are halved
    again and again down to single ones, which gives what column-by-column updates give in another order of summation.

    Args:
        weight: [out_features, in_features] float32. ``factor``: U of :class:`~sparsify.passes.gram.DampedGram`.
        choose: given the current weights of ``width`` columns, transposed [≤ width, out_features], and the index of
            the first, their mask, likewise. Called as soon as all columns before them are done.

    Returns:
        The new weight and the mask, [out_features, in_features].
    """
    # A column of the weight is a contiguous row here.
    columns = weight.t().contiguous()
    errors = torch.empty_like(columns)
    mask = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    scale = factor.diagonal().tolist()

    def run(start: int, stop: int, chosen: bool) -> None:
        if not chosen and stop - start <= width:
            mask[start:stop] = choose(columns[start:stop], start)
            chosen = True
        if stop - start == 1:
            torch.mul(columns[start], mask[start], out=errors[start])
            columns[start] -= errors[start]
            errors[start] /= scale[start]
            return
        unit = 1 if chosen else width
        half = start + -(-(stop - start) // (2 * unit)) * unit
        run(start, half, chosen)
        columns[half:stop].addmm_(factor[start:half, half:stop].t(), errors[start:half], alpha=-1)
        run(half, stop, chosen)

    run(0, len(columns), False)
    return columns.t(), mask.t()


def fixed(mask: Tensor) -> Chooser:
    """A chooser for a mask that is known already, [out_features, in_features]."""
    transposed = mask.t()
    return lambda columns, start: transposed[start : start + len(columns)]


def block_update(weight: Tensor, factor: Tensor, mask: Tensor, blocksize: int = 128) -> Tensor:
    """Remove the masked weights of ``blocksize`` columns jointly, then go on with the next; columns behind stay.

    With G the inverse of H restricted to this block and all columns right of it, the pruned weights w_P of a row ask
    for the change −w_P (G_PP)⁻¹ G_{P,:}; G is U_subᵀU_sub (algorithms.md, section 8.2, "block").

    Args:
        weight, mask: [out_features, in_features]. ``factor``: U.
    """
    weight = weight.clone()
    for start in range(0, weight.shape[1], blocksize):
        stop = min(start + blocksize, weight.shape[1])
        own = factor[start:stop, start:stop]
        pruned = mask[:, start:stop].to(weight)
        inverse = own.t() @ own
        for rows in torch.arange(len(weight), device=weight.device).split(1024):
            gone = pruned[rows]
            # G_PP with ones on the diagonal where a weight stays: the solution is zero there.
            system = inverse * gone.unsqueeze(2) * gone.unsqueeze(1)
            system.diagonal(dim1=1, dim2=2).add_(1 - gone)
            lower = torch.linalg.cholesky(system.double())
            right = (weight[rows, start:stop] * gone).double().unsqueeze(2)
            share = torch.cholesky_solve(right, lower).squeeze(2).float()
            weight[rows, start:] -= (share @ own.t()) @ factor[start:stop, start:]
    return weight.masked_fill(mask, 0)
