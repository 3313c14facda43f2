"""Wanda against the definitions of algorithms.md, section 3, written plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.errors import CalibrationError
from sparsify.method.spec import parse_pass
from sparsify.method.statistics import InputStatistics
from sparsify.passes.wanda import input_norm, variant_mask


def statistics(inputs: Tensor, sequences: int) -> InputStatistics:
    """Running form of section 1.3: one sequence at a time, float32."""
    total = torch.zeros(inputs.shape[-1])
    for n, one in enumerate(inputs.view(sequences, -1, inputs.shape[-1])):
        total = total * n / (n + 1) + one.norm(p=2, dim=0) ** 2 / (n + 1)
    return InputStatistics({"squared_norm": total}, inputs.numel() // inputs.shape[-1], sequences)


def official(weight: Tensor, a: Tensor, pattern: str) -> Tensor:
    """prune_wanda of the official repository, for one layer."""
    metric = weight.abs() * a.reshape(1, -1).sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if ":" in pattern:
        kept, m = map(int, pattern.split(":"))
        for column in range(0, weight.shape[1], m):
            part = metric[:, column : column + m].float()
            mask.scatter_(1, column + part.topk(m - kept, dim=1, largest=False)[1], True)
    else:
        order = metric.sort(dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(weight.shape[1] * float(pattern.rstrip("%")) / 100)], True)
    return mask


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "50%", "70%", "1%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_equal_the_official_code(pattern: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator).to(dtype)
    stats = statistics(torch.randn(8 * 16, 64, generator=generator) * torch.rand(64, generator=generator) * 5, 8)
    pruned = parse_pass(f"wanda:{pattern}").prune(weight, stats)
    mask = official(weight, stats.squared_norm, pattern)
    assert torch.equal(pruned.mask, mask)
    assert torch.equal(pruned.weight, weight.masked_fill(mask, 0)) and pruned.weight.dtype == dtype


def test_a_dead_input_goes_first() -> None:
    weight = torch.tensor([[9.0, 1, 2, 3]])
    stats = InputStatistics({"squared_norm": torch.tensor([0.0, 1, 1, 1])}, 4, 1)
    assert parse_pass("wanda:1:4").prune(weight, stats).weight.tolist() == [[0, 0, 0, 3]]
    assert parse_pass("wanda:25%").prune(weight, stats).weight.tolist() == [[0, 1, 2, 3]]


def test_all_zero_statistics_are_refused() -> None:
    with pytest.raises(CalibrationError, match="zero on every calibration token"):
        input_norm(InputStatistics({"squared_norm": torch.zeros(4)}, 4, 1))


def official_variant(metric: Tensor, sparsity: float) -> Tensor:
    """--use_variant of the official repository."""
    ordered = metric.sort(dim=-1, stable=True)[0]
    cumulative, total = ordered.cumsum(dim=1), metric.sum(dim=1)

    def at(alpha: float) -> tuple[Tensor, float]:
        fitting = cumulative <= (total * alpha).reshape(-1, 1)
        threshold = torch.gather(ordered, 1, fitting.sum(dim=1, keepdim=True) - 1)
        mask = metric <= threshold
        return mask, float(mask.sum() / mask.numel())

    alpha, history = 0.4, [0.0, 0.8]
    mask, reached = at(alpha)
    while abs(reached - sparsity) > 0.001 and history[1] - history[0] >= 0.001:
        if reached > sparsity:
            new = (alpha + history[0]) / 2.0
            history[1] = alpha
        else:
            new = (alpha + history[1]) / 2.0
            history[0] = alpha
        alpha = new
        mask, reached = at(alpha)
    return mask


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6, 0.95])
def test_variant_equals_the_official_code_where_that_runs(sparsity: float) -> None:
    metric = torch.rand(32, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(variant_mask(metric, sparsity), official_variant(metric, sparsity))


def test_variant_at_low_sparsity_prunes_nothing_in_rows_where_nothing_fits() -> None:
    metric = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.001, 1.0, 2.0, 3.0]])
    mask = variant_mask(metric, 0.05)
    assert not mask[0].any()


def test_variant_lets_rows_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator).abs() ** torch.linspace(0.5, 3, 16).view(-1, 1)
    stats = statistics(torch.randn(32, 64, generator=generator), 2)
    pruned = parse_pass("wanda:50%,variant=true").prune(weight, stats)
    assert len(set(pruned.mask.sum(dim=1).tolist())) > 1
    assert abs(float(pruned.mask.float().mean()) - 0.5) < 0.02


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_statistics_that_overflow_are_not_called_zero(value: float) -> None:
    for spec, name in (("wanda:2:4", "squared_norm"), ("wanda:2:4,norm=max", "absolute_max")):
        for rest in (0.0, 1.0):
            norms = InputStatistics({name: torch.tensor([value, rest, rest, rest])}, 4, 1)
            with pytest.raises(CalibrationError, match="overflow or are no numbers"):
                parse_pass(spec).prune(torch.ones(1, 4), norms)
