"""What passes that move weights share: the goal they fit, and what they leave as it is."""

from __future__ import annotations

import pytest
import torch
from support import slow

from sparsify.errors import CalibrationError
from sparsify.method.pattern import NM
from sparsify.method.spec import parse_pass
from sparsify.passes import SparseGPT


@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("kind", slow.KINDS)
def test_twin_solves_the_stated_least_squares(kind: str, blend: float) -> None:
    """W* and the masked optimum both from stacked equations, never from Gram matrices."""
    weight, pruned = slow.problem(kind)
    dense = pruned + 0.3 * pruned.roll(1, dims=0) * (pruned != 0)
    h, dead = slow.damped(pruned)
    damping = float((h.diagonal() - pruned.square().sum(dim=0) / 8 - dead.double()).mean())
    goal = slow.twin_goal(weight, pruned, dense, blend, damping).masked_fill(dead, 0)
    stats = slow.statistics(pruned, dense)
    ours = parse_pass(f"wanda:50%,update=exact,target=dense,blend={blend}").prune(weight, stats)
    mask = parse_pass("wanda:50%").prune(weight, stats).mask
    reference = slow.row_by_row(goal, h, mask)
    assert slow.close(ours.weight, reference.masked_fill(dead, 0), 1e-3 if kind == "ill-conditioned" else 1e-4)
    assert slow.objective(ours.weight, goal, h) <= 1.001 * slow.objective(reference, goal, h)


@pytest.mark.parametrize("rows", [1, 2, 24])
@pytest.mark.parametrize(
    "spec",
    ["sparsegpt:2:4", "apt:2:4", "apt:50%,compensation=block", "alps:50%", "twin:2:4", "wanda:2:4,update=iterative"],
)
def test_the_weight_given_is_left_alone(spec: str, rows: int) -> None:
    weight, inputs = slow.problem("random", rows=rows)
    before = weight.clone()
    parse_pass(spec).prune(weight, slow.statistics(inputs, inputs))
    assert torch.equal(weight, before)


def test_dead_inputs_can_be_kept() -> None:
    weight, inputs = slow.problem("dead")
    dead = inputs.square().sum(dim=0) == 0
    stats = slow.statistics(inputs)
    kept = parse_pass("sparsegpt:4:8,dead=keep").prune(weight, stats)
    assert torch.equal(kept.weight[:, dead], weight[:, dead].masked_fill(kept.mask[:, dead], 0))
    assert not parse_pass("sparsegpt:4:8").prune(weight, stats).weight[:, dead].any()


def test_a_mask_given_from_outside() -> None:
    weight, inputs = slow.problem("random")
    h, _ = slow.damped(inputs)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    ours = SparseGPT(NM(2, 4)).refit(weight, slow.statistics(inputs), mask)
    assert torch.equal(ours.mask, mask) and slow.close(ours.weight, slow.row_by_row(weight, h, mask))
    swept = SparseGPT(NM(2, 4)).refit(weight, slow.statistics(inputs), mask, "sweep")
    assert slow.objective(ours.weight, weight, h) < slow.objective(swept.weight, weight, h)


def test_an_update_past_the_dtype_is_refused() -> None:
    weight, inputs = slow.problem("random")
    with pytest.raises(CalibrationError, match="float16"):
        parse_pass("sparsegpt:2:4").prune((weight * 30000).clamp(-65000, 65000).half(), slow.statistics(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["sparsegpt:2:4", "apt:2:4", "twin:2:4", "alps:50%", "wanda:2:4,update=exact"])
def test_results_come_in_the_weights_dtype(spec: str, dtype: torch.dtype) -> None:
    weight, inputs = slow.problem("random")
    pruned = parse_pass(spec).prune(weight.to(dtype), slow.statistics(inputs, inputs))
    assert pruned.weight.dtype == dtype and not pruned.weight[pruned.mask].any()
