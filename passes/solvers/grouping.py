"""Which channels share a group of M, so that the best N of each group's M are worth most: a search that only gains.

With S [channels, rows] the worth of each weight, a partition into groups of M keeps K = Σ_groups Σ_rows (the N largest
of the group's M). Take one channel out of every group: with b the N-th largest of a group's other M − 1, the channel x
in the free place is worth Σ_rows max(0, x − b) more, and who goes where is a linear assignment. Since
max(0, x − b) = (|x − b| + x − b)/2 and the sums over x and over b are the same for every assignment, its benefits are
the L1 distances of the x and the b. A round does this for one place of every group; what a round gave is kept where
K, counted over all rows in float64, is larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.passes.solvers.assignment import assign

# Products of groups, groups and rows in one round; where there would be more, it looks at some of the rows.
_MOST = 4e9
# Of pairs of channels and rows: where there are fewer, all swaps of two are looked at as well.
_FEW = 3e7
# A sweep (a round for each place) that gains less than this of what is kept is the last one.
_LEAST = 5e-4
_SWEEPS = 20
# Groups that are looked at together.
_PART = 64


def kept(scores: Tensor, n: int, m: int) -> float:
    """K of the partition that ``scores`` [channels, rows] lie in: M neighbours are a group."""
    return float(_worth(scores, torch.arange(len(scores), device=scores.device).view(-1, m), n).sum())


def search(scores: Tensor, n: int, m: int, seed: int) -> Tensor:
    """An order of the channels [channels] whose groups of M neighbours keep at least what those of ``scores`` do.

    Args:
        scores: [channels, rows], none negative, the channels a multiple of ``m``.
    """
    groups = torch.arange(len(scores), device=scores.device).view(-1, m)
    generator = torch.Generator().manual_seed(seed)
    if len(groups) < 2:
        return groups.reshape(-1)
    worth, dealt = float(_worth(scores, groups, n).sum()), _dealt(scores, m)
    if (other := float(_worth(scores, dealt, n).sum())) > worth:
        groups, worth = dealt, other
    for _ in range(_SWEEPS):
        before = worth
        # Which of a group's channels is moved first differs from sweep to sweep.
        mixed = torch.rand(groups.shape, generator=generator).argsort(dim=1).to(groups.device)
        groups = groups.gather(1, mixed)
        for place in range(m):
            moved = _round(scores, groups, n, place, generator)
            if (other := float(_worth(scores, moved, n).sum())) > worth:
                groups, worth = moved, other
        if worth - before <= _LEAST * worth:
            break
    if scores.numel() * len(scores) <= _FEW:
        groups = _swapped(scores, groups, n, worth)
    return groups.sort(dim=1).values.reshape(-1)


def _worth(scores: Tensor, groups: Tensor, n: int) -> Tensor:
    """What each of ``groups`` [groups, m] keeps, in float64."""
    return torch.cat(
        [torch.stack(_largest(scores, part, n)).sum(dim=(0, 2), dtype=torch.float64) for part in groups.split(_PART)]
    )


def _largest(scores: Tensor, groups: Tensor, n: int) -> list[Tensor]:
    """The ``n`` largest worths in each of ``groups`` [groups, channels], row by row: n times [groups, rows]."""
    found: list[Tensor] = []
    for column in groups.unbind(dim=1):
        value = scores[column]
        for i, other in enumerate(found):
            found[i], value = torch.maximum(other, value), torch.minimum(other, value)
        if len(found) < n:
            found.append(value)
    return found


def _dealt(scores: Tensor, m: int) -> Tensor:
    """Channels dealt out by their worth: to every group one of the largest, one of the next, and so on."""
    order = scores.sum(dim=1).argsort(descending=True, stable=True)
    return order.view(m, -1).t().contiguous()


def _round(scores: Tensor, groups: Tensor, n: int, place: int, generator: torch.Generator) -> Tensor:
    """``groups`` with the channels at ``place`` of each assigned anew."""
    moving, staying = groups[:, place], torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
    rows = max(1, int(_MOST / len(groups) ** 2))
    seen = scores
    if rows < scores.shape[1]:
        chosen = torch.randperm(scores.shape[1], generator=generator)[:rows].to(scores.device)
        seen = scores[:, chosen]
    bars = torch.cat([_largest(seen, part, n)[-1] for part in staying.split(_PART)])
    to = assign(torch.cdist(seen[moving], bars, p=1))
    result = groups.clone()
    result[to, place] = moving
    return result


def _swapped(scores: Tensor, groups: Tensor, n: int, worth: float) -> Tensor:
    """The best swaps of two channels of different groups, as long as one gains."""
    count, m = groups.shape
    while True:
        own = _worth(scores, groups, n)
        flat = groups.reshape(-1)
        others = torch.stack([torch.cat([groups[:, :p], groups[:, p + 1 :]], dim=1) for p in range(m)], dim=1)
        best = _largest(scores, others.view(count * m, m - 1), n)
        x = scores[flat]
        # [p, q]: what q's group keeps with p in q's place.
        sums = x.sum(dim=1)[:, None] - best[-1].sum(dim=1)
        taken = (torch.cdist(x, best[-1], p=1) + sums) / 2 + torch.stack(best).sum(dim=(0, 2))
        gain = (taken + taken.t()).double() - own.repeat_interleave(m)[:, None] - own.repeat_interleave(m)
        # [group, group, pair]: the best pair of each two groups.
        pairs = gain.view(count, m, count, m).transpose(1, 2).reshape(count, count, m * m)
        top, pair = pairs.max(dim=2)
        top.fill_diagonal_(0)
        most, partner = top.max(dim=1)
        here = torch.arange(count, device=groups.device)
        chosen = ((partner[partner] == here) & (here < partner) & (most > 1e-6 * worth / count)).nonzero()[:, 0]
        if not len(chosen):
            return groups
        moved, other = groups.clone(), partner[chosen]
        at = pair[chosen, other]
        moved[chosen, at // m], moved[other, at % m] = groups[other, at % m], groups[chosen, at // m]
        after = float(_worth(scores, moved, n).sum())
        if after <= worth:
            return groups
        groups, worth = moved, after
