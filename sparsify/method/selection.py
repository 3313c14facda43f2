"""From scores to masks: which weights of a matrix a pattern prunes.

Everywhere ``scores`` is [out_features, in_features], a low score is pruned, and ``mask`` is boolean of the same
shape with True for a pruned weight. Among equal scores the lower index goes first, always. Rules and counts are
those of section 1.4 of the design's algorithms.md; no function here sorts a whole matrix, because only the k-th
smallest value is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from sparsify.errors import PatternError
from sparsify.method.pattern import NM, Pattern, Unstructured
from sparsify.tensors import all_finite

Axis = Literal["output", "input", "layer"]
Count = Literal["floor", "exact", "threshold", "total"]

# Comparing all pairs in a group costs M(M-1)/2 streaming passes; past this a sort of each group is cheaper.
_PAIRWISE_LIMIT = 8
# Pairs are compared over this many groups at a time, so that the working set stays in a CPU's cache; a GPU, which takes
# as long to be told as to compute, takes many more at once.
_GROUPS_AT_ONCE, _ON_GPU = 1 << 16, 1 << 24
# A linear weight that is asked for a pattern has it where it has this many zeros; with fewer it was left dense.
LEAST_ZEROS = 0.05
# And one with fewer than this was not pruned at all: numbers that float16 has not are zero by chance, one in a million.
_CHANCE = 1e-3
# How many values guess where the k-th of a long row lies.
_SAMPLE = 1 << 13


@dataclass(frozen=True)
class Comparison:
    """The set of weights that are compared with each other (Wanda, section "comparison groups").

    ``output``: ``blocksize`` consecutive output neurons with all their inputs. ``input``: ``blocksize``
    consecutive input features of all output neurons. ``layer``: the whole matrix. ``count`` turns a fraction of
    n weights into a whole number: ``floor`` is the official code's ``int(n * float(s))``, ``exact`` floors
    the exact product (29 rather than 28 of 100 at 29%), and ``threshold`` is the official layer rule, which
    prunes everything up to and including the score at sorted index ``int(n * s)``: one weight more, and all ties.
    ``total`` prunes ``floor(s · size)`` of the whole matrix exactly, so that groups differ by one weight at most.
    """

    axis: Axis = "output"
    blocksize: int = 1
    count: Count = "floor"


def select(scores: Tensor, pattern: Pattern, comparison: Comparison = Comparison()) -> Tensor:
    """Return the mask that ``pattern`` lays on ``scores``.

    Args:
        scores: [out_features, in_features], any float dtype, finite.
        comparison: which weights compete for an unstructured pattern; N:M competes within its own groups.

    Raises:
        PatternError: N:M does not divide in_features, or a score is not finite.
    """
    if not all_finite(scores):
        raise PatternError(
            f"a {pattern} mask", found="scores that are NaN or infinite", do="Look for NaN in the weight"
        )
    if isinstance(pattern, NM):
        return _select_nm(scores, pattern)
    rows, columns = scores.shape
    if comparison.count == "total":
        return _exact_total(scores, pattern, comparison)
    if comparison.axis == "layer":
        return _fraction(scores.reshape(1, -1), pattern, comparison.count).view(rows, columns)
    size = comparison.blocksize
    if comparison.axis == "output":
        return _by_rows(scores, size, pattern, comparison.count)
    if size == 1:
        return _by_rows(scores.t().contiguous(), 1, pattern, comparison.count).t().contiguous()
    parts = [
        _fraction(part.reshape(1, -1), pattern, comparison.count).view(part.shape) for part in scores.split(size, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _by_rows(scores: Tensor, size: int, pattern: Unstructured, count: Count) -> Tensor:
    """Mask where each run of ``size`` rows is one group; the last may be smaller."""
    rows, columns = scores.shape
    whole = rows - rows % size
    parts = []
    if whole:
        grouped = scores[:whole].reshape(whole // size, size * columns)
        parts.append(_fraction(grouped, pattern, count).view(whole, columns))
    if whole < rows:
        parts.append(_fraction(scores[whole:].reshape(1, -1), pattern, count).view(rows - whole, columns))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fraction(groups: Tensor, pattern: Unstructured, count: Count) -> Tensor:
    """Mask of the pattern's fraction in each row of ``groups`` [groups, members]."""
    members = groups.shape[1]
    if count == "threshold":
        index = int(members * float(pattern.sparsity))
        return groups <= groups.kthvalue(index + 1, dim=1, keepdim=True).values
    exact = pattern.sparsity if count == "exact" else float(pattern.sparsity)
    return smallest(groups, int(members * exact))


def smallest(groups: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` smallest in each row of [groups, members], lower index first among equals.

    Equal to the first k of a stable sort; only rows in which the k-th value is tied cost more than a selection.
    """
    if k <= 0:
        return torch.zeros_like(groups, dtype=torch.bool)
    kth = _kth_of_long(groups, k) if len(groups) == 1 else groups.kthvalue(k, dim=1, keepdim=True).values
    mask = groups <= kth
    tied = (mask.sum(dim=1) > k).nonzero().flatten()
    if tied.numel():
        part, value = groups[tied], kth[tied]
        below, equal = part < value, part == value
        room = k - below.sum(dim=1, keepdim=True)
        mask[tied] = below | (equal & (equal.cumsum(dim=1) <= room))
    return mask


def _kth_of_long(row: Tensor, k: int) -> Tensor:
    """The k-th smallest of one long row [1, members]: selected among the few that a sample cannot rule out."""
    values = row.flatten()
    if len(values) < _SAMPLE * 8:
        return values.kthvalue(k).values.view(1, 1)
    sample = values[:: len(values) // _SAMPLE].sort().values
    at = k * len(sample) // len(values)
    low, high = sample[max(0, at - _SAMPLE // 32)], sample[min(len(sample) - 1, at + _SAMPLE // 32)]
    below = int((values < low).sum())
    middle = values[(values >= low) & (values <= high)]
    if below < k <= below + len(middle):
        return middle.kthvalue(k - below).values.view(1, 1)
    return values.kthvalue(k).values.view(1, 1)


def _select_nm(scores: Tensor, pattern: NM) -> Tensor:
    rows, columns = scores.shape
    if reason := pattern.unfit(columns):
        raise PatternError(f"pattern {pattern}", found=reason, do="Leave this weight dense or choose another M")
    groups, drop = scores.reshape(-1, pattern.m), pattern.m - pattern.n
    mask = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    size = _GROUPS_AT_ONCE if scores.is_cpu else _ON_GPU
    for start in range(0, groups.shape[0], size):
        # Column by column: transposing so narrow a matrix at once takes three times as long.
        found = lowest(torch.stack(groups[start : start + size].unbind(1)), drop)
        torch.stack(found.unbind(0), dim=1, out=mask[start : start + size])
    return mask.view(rows, columns)


def _exact_total(scores: Tensor, pattern: Unstructured, comparison: Comparison) -> Tensor:
    """Groups in their order each prune what is due up to their end: floor(s · weights so far) less what went before."""
    rows, columns = scores.shape
    size = comparison.blocksize
    if comparison.axis == "layer":
        return smallest(scores.reshape(1, -1), int(pattern.sparsity * scores.numel())).view(rows, columns)
    if comparison.axis == "input":
        turned = Comparison("output", size, "total")
        return _exact_total(scores.t().contiguous(), pattern, turned).t().contiguous()
    bounds = [*range(0, rows, size), rows]
    due = [int(pattern.sparsity * columns * bound) for bound in bounds]
    mask = torch.empty(rows, columns, dtype=torch.bool, device=scores.device)
    alike: dict[tuple[int, int], list[int]] = {}
    for start, stop, before, upto in zip(bounds, bounds[1:], due, due[1:], strict=False):
        alike.setdefault((stop - start, upto - before), []).append(start)
    # Few different counts: groups that prune equally many are selected together.
    for (length, drop), starts in alike.items():
        index = torch.tensor(starts, device=scores.device).unsqueeze(1) + torch.arange(length, device=scores.device)
        part = smallest(scores[index.flatten()].view(len(starts), -1), drop)
        mask[index.flatten()] = part.view(-1, columns)
    return mask


def lowest(members: Tensor, drop: int) -> Tensor:
    """Mask of the ``drop`` lowest of each group of M, for groups side by side: [M, groups].

    Those are the ones that fewer than ``drop`` members precede. Counting predecessors over all pairs replaces a sort
    of each group: a few comparisons over long vectors. i < j precedes on ``<=``, so that the lower index wins a tie.
    """
    m = len(members)
    if m > _PAIRWISE_LIMIT:
        order = members.sort(dim=0, stable=True).indices[:drop]
        return torch.zeros_like(members, dtype=torch.bool).scatter_(0, order, True)
    rows = members.unbind(0)
    # All pairs are lost by their first member, until the second is found not to be lower.
    ranks = torch.arange(m - 1, -1, -1, dtype=torch.int8, device=members.device).unsqueeze(1).repeat(1, len(rows[0]))
    for j in range(1, m):
        for i in range(j):
            first = (rows[i] <= rows[j]).view(torch.int8)
            ranks[j] += first
            ranks[i] -= first
    return ranks < drop


def holds(weight: Tensor, pattern: Pattern, comparison: Comparison = Comparison()) -> str | None:
    """Say how ``weight`` [out_features, in_features] breaks ``pattern``, or return None.

    For an unstructured pattern the number of zeros in each comparison group is checked, for N:M the
    number of non-zeros in each group.
    """
    if isinstance(pattern, NM):
        over = nm_broken(weight, pattern)
        return (
            f"{over} of {weight.numel() // pattern.m} groups keep more than {pattern.n} of {pattern.m}"
            if over
            else None
        )
    zeros, members = _zeros_by_group(weight, comparison)
    due = torch.tensor(_due(members, pattern, comparison), device=zeros.device)
    short = (zeros < due).nonzero().flatten()
    if not short.numel():
        return None
    first = int(short[0])
    return (
        f"{len(short)} of {len(members)} comparison groups have too few zeros: number {first} has {int(zeros[first])} "
        f"among {members[first]} weights, {pattern} asks for {int(due[first])}"
    )


def nm_broken(weight: Tensor, pattern: NM) -> int:
    """How many groups of M along the last axis keep more than N; the axis is a multiple of M."""
    return int((_counts(weight, pattern.m) > pattern.n).sum())


def nm_most(weight: Tensor, m: int) -> int:
    """The most that a group of ``m`` along the last axis keeps: the N of N:M; ``m`` itself where there are no whole
    groups."""
    return m if weight.shape[-1] % m or not weight.numel() else int(_counts(weight, m).max())


def _counts(weight: Tensor, m: int) -> Tensor:
    kept = (weight != 0).reshape(-1, m)
    if m > _PAIRWISE_LIMIT:
        return kept.sum(dim=1)
    # Summing few booleans a row would first make whole numbers of 8 bytes of all of them.
    first, *others = kept.view(torch.int8).unbind(1)
    counts = first.clone()
    for column in others:
        counts += column
    return counts


def is_pruned(kept: Tensor) -> bool:
    """Whether a linear weight was pruned, by where it is not zero, to however small a percentage; of fewer zeros than
    one in a thousand it has them by chance."""
    return int(kept.numel() - kept.count_nonzero()) >= max(1, _CHANCE * kept.numel())


def to_hold(kept: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Of weights by name, True where an entry is not zero, those whose zeros training has to hold: all that have some,
    where any was pruned. What is zero throughout (LoRA's B before it is trained) holds nothing."""
    found = {name: mask for name, mask in kept if mask.any() and not mask.all()}
    return found if any(map(is_pruned, found.values())) else {}


def falls_short(weight: Tensor, pattern: Unstructured) -> str | None:
    """Say where ``weight`` has fewer zeros than ``pattern`` makes, whatever was compared with what; else None.

    Each output neuron may floor its own count, so a matrix may fall short by less than one weight per row.
    """
    due, zeros = int(weight.numel() * float(pattern.sparsity)), int((weight == 0).sum())
    if zeros <= due - weight.shape[0]:
        return f"{zeros} of {weight.numel()} weights are zero, {pattern} asks for {due}"
    return None


def _zeros_by_group(weight: Tensor, comparison: Comparison) -> tuple[Tensor, list[int]]:
    """Zeros and members of every comparison group, in order."""
    zeros = weight == 0
    if comparison.axis == "layer":
        return zeros.sum().reshape(1), [weight.numel()]
    lines, width = (zeros.sum(dim=1), weight.shape[1]) if comparison.axis == "output" else (zeros.sum(0), len(weight))
    parts = lines.split(comparison.blocksize)
    if comparison.blocksize == 1:
        return lines, [width] * len(lines)
    return torch.stack([part.sum() for part in parts]), [len(part) * width for part in parts]


def _due(members: list[int], pattern: Unstructured, comparison: Comparison) -> list[int]:
    """How many weights of each group go."""
    if comparison.count != "total":
        share = pattern.sparsity if comparison.count == "exact" else float(pattern.sparsity)
        return [int(count * share) for count in members]
    upto = [int(pattern.sparsity * bound) for bound in accumulate(members, initial=0)]
    return [after - before for before, after in pairwise(upto)]
