"""How a share of zeros is spread over the sites of a model, so that the total is what was asked for, to the weight.

``owl``: a layer with more outliers among its scores keeps more. Source: Yin et al., "Outlier Weighed Layerwise
Sparsity (OWL)" (2310.05175): with D_l the share of scores |W|·‖X‖ of layer l above M times their mean, sparsity is
1 − (D scaled to a range of 2λ, shifted to the mean density). A layer is a repeated block, as there.

``error``: zeros go where they cost least output. Each site's error ‖XWᵀ−XŴᵀ‖²/‖XWᵀ‖² is measured at several
sparsities (Ŵ by |W|·‖X‖ per output neuron, nothing updated), and the budget is spent along the convex hulls of these
curves, cheapest step first: the optimum of the separable problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparsify.analysis.linear import LinearSite
from sparsify.calibration.recorder import GroupRecorder
from sparsify.errors import PatternError
from sparsify.pattern import Unstructured
from sparsify.program import Program
from sparsify.selection import Comparison, select
from sparsify.targets import Target
from sparsify.weight_pass import WeightPass

OWL_SPREAD, ERROR_SPREAD = 0.08, 0.1
_STEPS = 8  # points of an error curve within the spread


def allocate(
    program: Program,
    weight_pass: WeightPass,
    targets: Sequence[Target],
    recorders: Mapping[str, GroupRecorder],
    sequences: int,
    device: torch.device,
) -> dict[str, WeightPass]:
    """``weight_pass`` for each target, with a pattern of its own; together they prune floor(s · all weights).

    Args:
        recorders: squared norms and a sketch of the input of each target, of the dense model.

    Raises:
        PatternError: the total cannot be met within the spread.
    """
    assert isinstance(weight_pass.pattern, Unstructured)
    spread = weight_pass.spread or (OWL_SPREAD if weight_pass.allocation == "owl" else ERROR_SPREAD)
    sizes = {t.parameter: t.site.experts * t.site.shape[0] * t.site.shape[1] for t in targets}
    share = weight_pass.pattern.sparsity
    total = int(share * sum(sizes.values()))
    bound = Fraction(spread).limit_denominator(10**6)
    low, high = max(Fraction(0), share - bound), min(Fraction(1), share + bound)
    if weight_pass.allocation == "owl":
        wished = _owl(program, weight_pass, targets, recorders, sequences, device, spread)
        counts = _meet(wished, sizes, total, low, high)
    else:
        counts = _cheapest(program, targets, recorders, sequences, device, sizes, total, low, high)
    found: dict[str, WeightPass] = {}
    for target in targets:
        site, pruned = target.site, counts[target.parameter]
        if not 0 < pruned < sizes[target.parameter]:
            raise PatternError(
                f"{weight_pass.allocation} allocation of {weight_pass.pattern}",
                found=f"{site.name} would lose {pruned} of {sizes[target.parameter]} weights",
                do=f"Choose a smaller spread than {spread:g}",
            )
        # A stack of experts is pruned matrix by matrix, each by the same share.
        pattern = Unstructured(Fraction(pruned, sizes[target.parameter]))
        found[target.parameter] = dataclasses.replace(
            weight_pass, pattern=pattern, count="total", allocation="uniform", spread=None, outliers=5.0
        )
    return found


def _scores(
    program: Program, site: LinearSite, recorder: GroupRecorder, sequences: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Weight and score |W|·‖X‖ of each expert, [out_features, in_features]."""
    matrices = site.matrices(program.weights.read(site.parameter).to(device))
    pairs = []
    for expert in range(site.experts):
        norms = recorder.statistics(expert, sequences).squared_norm.sqrt().float()
        weight = matrices[expert].float()
        pairs.append((weight, weight.abs() * (norms if recorder.tokens[expert] else 1)))
    return pairs


def _owl(
    program: Program,
    weight_pass: WeightPass,
    targets: Sequence[Target],
    recorders: Mapping[str, GroupRecorder],
    sequences: int,
    device: torch.device,
    spread: float,
) -> dict[str, Fraction]:
    """The sparsity that OWL gives each target, before the total is met."""
    assert isinstance(weight_pass.pattern, Unstructured)
    layers: dict[str, list[Target]] = {}
    for target in targets:
        layers.setdefault(target.site.block or target.parameter, []).append(target)
    outliers: dict[str, float] = {}
    for name, members in layers.items():
        # The mean is over the scores of the whole layer: summed first, counted on a second look.
        total, count, above = 0.0, 0, 0
        for target in members:
            for _, scores in _scores(program, target.site, recorders[target.parameter], sequences, device):
                total, count = total + float(scores.sum(dtype=torch.float64)), count + scores.numel()
        for target in members:
            for _, scores in _scores(program, target.site, recorders[target.parameter], sequences, device):
                above += int((scores > weight_pass.outliers * total / count).sum())
        outliers[name] = above / count
    least, most = min(outliers.values()), max(outliers.values())
    span = (most - least) or 1.0
    scaled = {name: (d - least) / span * 2 * spread for name, d in outliers.items()}
    mean = sum(scaled.values()) / len(scaled)
    share = float(weight_pass.pattern.sparsity)
    return {
        target.parameter: Fraction(share - (scaled[name] - mean)).limit_denominator(10**9)
        for name, members in layers.items()
        for target in members
    }


def _meet(
    wished: Mapping[str, Fraction], sizes: Mapping[str, int], total: int, low: Fraction, high: Fraction
) -> dict[str, int]:
    """Whole numbers nearest to ``wished`` shares, shifted alike, that sum to ``total`` and keep the bounds.

    Raises:
        PatternError: no shift meets the total.
    """
    floor = {name: -int(-low * size) for name, size in sizes.items()}
    ceiling = {name: int(high * size) for name, size in sizes.items()}

    def at(shift: Fraction) -> dict[str, int]:
        return {n: min(max(int((wished[n] + shift) * sizes[n]), floor[n]), ceiling[n]) for n in sizes}

    below, above = Fraction(-2), Fraction(2)
    for _ in range(60):
        middle = (below + above) / 2
        if sum(at(middle).values()) <= total:
            below = middle
        else:
            above = middle
    counts = at(below)
    missing = total - sum(counts.values())
    for name in sizes:
        more = min(missing, ceiling[name] - counts[name])
        counts[name] += more
        missing -= more
    if missing:
        raise PatternError(
            f"an allocation of {total} zeros",
            found=f"bounds of {float(low):.1%} to {float(high):.1%} per site leave room for {sum(counts.values())}",
            do="Choose a larger spread, or allocation=uniform",
        )
    return counts


def _cheapest(
    program: Program,
    targets: Sequence[Target],
    recorders: Mapping[str, GroupRecorder],
    sequences: int,
    device: torch.device,
    sizes: Mapping[str, int],
    total: int,
    low: Fraction,
    high: Fraction,
) -> dict[str, int]:
    """Counts that minimise the sum of the sites' relative squared errors."""
    levels = [low + (high - low) * i / _STEPS for i in range(_STEPS + 1)]
    steps: list[tuple[float, str, int]] = []
    counts: dict[str, int] = {}
    for target in targets:
        name = target.parameter
        points = [int(level * sizes[name]) for level in levels]
        errors = _errors(program, target.site, recorders[name], sequences, device, levels)
        counts[name] = points[0]
        at = _hull(points, errors)
        for i, j in zip(at, at[1:], strict=False):
            gap = points[j] - points[i]
            steps.append(((errors[j] - errors[i]) / gap, name, gap))
    missing = total - sum(counts.values())
    # Hulls are convex, so that a site's steps come in their order.
    for _, name, gap in sorted(steps, key=lambda step: step[0]):
        taken = min(gap, missing)
        counts[name] += taken
        missing -= taken
    if missing:
        raise PatternError(
            f"an allocation of {total} zeros",
            found=f"the upper bound of {float(high):.1%} per site leaves {missing} of them out",
            do="Choose a larger spread, or allocation=uniform",
        )
    return counts


def _errors(
    program: Program,
    site: LinearSite,
    recorder: GroupRecorder,
    sequences: int,
    device: torch.device,
    levels: Sequence[Fraction],
) -> list[float]:
    """Relative squared output error of a site at each sparsity."""
    pairs = _scores(program, site, recorder, sequences, device)
    errors = []
    for level in levels:
        pruned = (weight.masked_fill(_mask(scores, level), 0) for weight, scores in pairs)
        errors.append((recorder.sketch.relative_error((weight for weight, _ in pairs), pruned) or 0.0) ** 2)
    return errors


def _mask(scores: Tensor, level: Fraction) -> Tensor:
    if 0 < level < 1:
        return select(scores, Unstructured(level), Comparison(count="total"))
    return torch.full_like(scores, level == 1, dtype=torch.bool)


def _hull(points: Sequence[int], errors: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of (points, errors)."""
    hull: list[int] = []
    for i in range(len(points)):
        if hull and points[i] == points[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (errors[b] - errors[a]) * (points[i] - points[a]) < (errors[i] - errors[a]) * (points[b] - points[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
