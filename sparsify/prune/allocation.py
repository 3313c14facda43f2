"""How a share of zeros is spread over the sites of a model, so that the total is what was asked for, to the weight.

``owl``: a layer with more outliers among its scores keeps more. Source: Yin et al., "Outlier Weighed Layerwise
Sparsity (OWL)" (2310.05175): with D_l the share of scores |W|·‖X‖ of layer l above M times their mean, sparsity is
1 − (D scaled to a range of 2λ, shifted to the mean density). A layer is a repeated block, as there.

``error``: zeros go where they cost least output. Each site's error ‖XWᵀ−XŴᵀ‖²/‖XWᵀ‖² is measured at several
sparsities (Ŵ by |W|·‖X‖ per output neuron, nothing updated), and the budget is spent along the convex hulls of these
curves, cheapest step first: the optimum of the separable problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsify.calibration.recorder import GroupRecorder
from sparsify.errors import PatternError
from sparsify.ir.program import Program
from sparsify.method.pattern import Unstructured
from sparsify.method.selection import Comparison, select
from sparsify.method.weight_pass import WeightPass
from sparsify.prune.targets import Target
from sparsify.tensors import zeroed

OWL_SPREAD, ERROR_SPREAD = 0.08, 0.1
_STEPS = 8  # points of an error curve within the spread


@dataclass(frozen=True)
class Measured:
    """What an allocation goes by: the weights, and of the dense model the inputs of each target.

    Attributes:
        recorders: by parameter, squared norms and a sketch of the input. sequences: calibration sequences.
    """

    program: Program
    recorders: Mapping[str, GroupRecorder]
    sequences: int
    device: torch.device

    def scores(self, target: Target) -> list[tuple[Tensor, Tensor]]:
        """Weight and score |W|·‖X‖ of each expert, [out_features, in_features]."""
        site, recorder = target.site, self.recorders[target.parameter]
        matrices = site.matrices(self.program.weights.read(site.parameter).to(self.device))
        pairs = []
        for expert in range(site.experts):
            norms = recorder.statistics(expert, self.sequences).squared_norm.sqrt().float()
            weight = matrices[expert].float()
            pairs.append((weight, weight.abs() * (norms if recorder.tokens[expert] else 1)))
        return pairs

    def errors(self, target: Target, levels: Sequence[Fraction]) -> list[float]:
        """Relative squared output error of a target at each sparsity."""
        pairs, recorder = self.scores(target), self.recorders[target.parameter]
        errors = []
        for level in levels:
            pruned = (zeroed(weight, _mask(scores, level)) for weight, scores in pairs)
            dense = (weight for weight, _ in pairs)
            errors.append((recorder.sketch.relative_error(dense, pruned, world=recorder.world) or 0.0) ** 2)
        return errors


@dataclass(frozen=True)
class _Budget:
    """``total`` zeros over targets of these sizes, each between ``low`` and ``high`` of its own."""

    sizes: Mapping[str, int]
    total: int
    low: Fraction
    high: Fraction


def allocate(weight_pass: WeightPass, targets: Sequence[Target], measured: Measured) -> dict[str, WeightPass]:
    """``weight_pass`` for each target, with a pattern of its own; together they prune floor(s · all weights).

    Raises:
        PatternError: the total cannot be met within the spread.
    """
    assert isinstance(weight_pass.pattern, Unstructured)
    spread = weight_pass.spread or (OWL_SPREAD if weight_pass.allocation == "owl" else ERROR_SPREAD)
    sizes = {t.parameter: t.site.experts * t.site.shape[0] * t.site.shape[1] for t in targets}
    share = weight_pass.pattern.sparsity
    total = int(share * sum(sizes.values()))
    bound = Fraction(spread).limit_denominator(10**6)
    budget = _Budget(sizes, total, max(Fraction(0), share - bound), min(Fraction(1), share + bound))
    if weight_pass.allocation == "owl":
        counts = _meet(_owl(weight_pass, targets, measured, spread), budget)
    else:
        counts = _cheapest(targets, measured, budget)
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
        found[target.parameter] = weight_pass.allotted(pattern)
    return found


def _owl(weight_pass: WeightPass, targets: Sequence[Target], measured: Measured, spread: float) -> dict[str, Fraction]:
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
            for _, scores in measured.scores(target):
                total, count = total + float(scores.sum(dtype=torch.float64)), count + scores.numel()
        for target in members:
            for _, scores in measured.scores(target):
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


def _meet(wished: Mapping[str, Fraction], budget: _Budget) -> dict[str, int]:
    """Whole numbers nearest to ``wished`` shares, shifted alike, that sum to ``total`` and keep the bounds.

    Raises:
        PatternError: no shift meets the total.
    """
    sizes, total = budget.sizes, budget.total
    floor = {name: -int(-budget.low * size) for name, size in sizes.items()}
    ceiling = {name: int(budget.high * size) for name, size in sizes.items()}

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
            found=f"bounds of {float(budget.low):.1%} to {float(budget.high):.1%} per site leave room for "
            f"{sum(counts.values())}",
            do="Choose a larger spread, or allocation=uniform",
        )
    return counts


def _cheapest(targets: Sequence[Target], measured: Measured, budget: _Budget) -> dict[str, int]:
    """Counts that minimise the sum of the sites' relative squared errors."""
    low, high, total = budget.low, budget.high, budget.total
    levels = [low + (high - low) * i / _STEPS for i in range(_STEPS + 1)]
    steps: list[tuple[float, str, int]] = []
    counts: dict[str, int] = {}
    for target in targets:
        name = target.parameter
        points = [int(level * budget.sizes[name]) for level in levels]
        errors = measured.errors(target, levels)
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
