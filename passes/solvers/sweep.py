"""The sweep of optimal brain surgery over columns: prune one, compensate on those to its right, go on.

Source: SparseGPT (2301.00774), algorithm 1; algorithms.md, section 5.2. The paper carries the factor of H⁻¹ along and
updates all columns to the right of one that was pruned. Here the same numbers come from the factor of H itself: with
H = MMᵀ, M upper triangular, a row's loss is ‖δM‖², whose entry j is δ_j·M_jj plus what columns to the left put there.
Given those, column j is at its optimum where the entry is zero: w_j = g_j − Σ_{i<j} δ_i·M_ij / M_jj. No inverse of H is
needed; only where several columns are ranked together, their joint optimum takes a triangular solve of their own size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.tensors import zeroed

# Blocks up to this width are inverted all at once beforehand.
_SMALL = 16
# Rows whose joint systems are solved at once.
_ROWS = 1024

Chooser = Callable[[Tensor, int], Tensor]
Settler = Callable[[Tensor, int], None]


def sweep(
    weight: Tensor, root: Tensor, choose: Chooser | Tensor, width: int, settle: Settler | None = None
) -> tuple[Tensor, Tensor]:
    """Prune the columns of ``weight`` from left to right, each from its optimum given all before it.

    Updates wait until they are needed and are then applied as one matrix product: columns are halved again and again
    down to single ones, which gives what column-by-column updates give in another order of summation.

    Args:
        weight: [out_features, in_features] float32. ``root``: M of :class:`~sparsify.passes.solvers.gram.DampedGram`.
        choose: a mask that is known already, [out_features, in_features]; or a function that, given the weights of
            ``width`` columns at their optimum after all columns before them, transposed [≤ width, out_features], and
            the index of the first, returns their mask, likewise.
        settle: rounds one column in place, given its index; what that changes is compensated as pruning is.

    Returns:
        The new weight and the mask, [out_features, in_features].
    """
    # A column of the weight is a contiguous row here. ``changes`` holds −g until a column is done, then δ.
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    changes = columns.neg()
    mask = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    root = root / root.diagonal()
    inverses = _block_inverses(root, width) if width <= _SMALL else root
    rows = list(zip(columns.unbind(0), mask.unbind(0), changes.unbind(0), strict=True))

    chooser = None if isinstance(choose, Tensor) else choose
    if isinstance(choose, Tensor):
        mask.copy_(choose.t())

    def run(start: int, stop: int, chosen: bool) -> None:
        if not chosen and chooser is not None and stop - start <= width:
            # Their joint optimum δ solves δ·M̃ = what the columns before them put there.
            shift = columns[start:stop] + changes[start:stop]
            if stop - start == width <= _SMALL:
                shift = inverses[start // width] @ shift
            else:
                inner = root[start:stop, start:stop].t()
                shift = torch.linalg.solve_triangular(inner, shift, upper=False, unitriangular=True)
            mask[start:stop] = chooser(shift - changes[start:stop], start)
            chosen = True
        if stop - start == 1:
            column, gone, change = rows[start]
            column.masked_fill_(gone, 0)
            if settle is not None:
                settle(column, start)
            change.add_(column)
            return
        unit = 1 if chosen else width
        half = start + -(-(stop - start) // (2 * unit)) * unit
        run(start, half, chosen)
        columns[half:stop].addmm_(root[start:half, half:stop].t(), changes[start:half], alpha=-1)
        run(half, stop, chosen)

    run(0, len(columns), chooser is None)
    return columns.t(), mask.t()


def _block_inverses(root: Tensor, width: int) -> Tensor:
    """Transposed inverses of the blocks on the diagonal of ``root``, [blocks, width, width]."""
    whole = len(root) // width
    index = torch.arange(whole * width, device=root.device).view(whole, width)
    blocks = root[index.unsqueeze(2), index.unsqueeze(1)]
    unit = torch.eye(width, dtype=root.dtype, device=root.device).expand_as(blocks)
    return torch.linalg.solve_triangular(blocks, unit, upper=True, unitriangular=True).mT.contiguous()


def block_update(weight: Tensor, inverse_root: Tensor, mask: Tensor, blocksize: int = 128) -> Tensor:
    """Remove the masked weights of ``blocksize`` columns jointly, then go on with the next; columns behind stay.

    With G the inverse of H restricted to this block and all columns right of it, the pruned weights w_P of a row ask
    for the change −w_P (G_PP)⁻¹ G_{P,:}; G is U_subᵀU_sub (algorithms.md, section 8.2, "block").

    Args:
        weight, mask: [out_features, in_features]. ``inverse_root``: U with H⁻¹ = UᵀU.
    """
    weight = weight.clone()
    for start in range(0, weight.shape[1], blocksize):
        stop = min(start + blocksize, weight.shape[1])
        own = inverse_root[start:stop, start:stop]
        pruned = mask[:, start:stop].to(weight)
        inverse = own.t() @ own
        for rows in torch.arange(len(weight), device=weight.device).split(_ROWS):
            gone = pruned[rows]
            # G_PP with ones on the diagonal where a weight stays: the solution is zero there.
            system = inverse * gone.unsqueeze(2) * gone.unsqueeze(1)
            system.diagonal(dim1=1, dim2=2).add_(1 - gone)
            lower = torch.linalg.cholesky(system.double())
            right = (weight[rows, start:stop] * gone).double().unsqueeze(2)
            share = torch.cholesky_solve(right, lower).squeeze(2).float()
            weight[rows, start:] -= (share @ own.t()) @ inverse_root[start:stop, start:]
    return zeroed(weight, mask)
