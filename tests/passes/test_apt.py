"""APT: its two masks against their definitions, and its compensations against the optimum."""

from __future__ import annotations

import pytest
import torch
from support import slow

from sparsify.errors import SpecError
from sparsify.method.pattern import NM, Unstructured
from sparsify.method.selection import select
from sparsify.method.spec import parse_pass
from sparsify.passes import APT


@pytest.mark.parametrize("solver", ["cholesky", "cg", "auto"])
@pytest.mark.parametrize("pattern", slow.PATTERNS)
@pytest.mark.parametrize("kind", slow.KINDS)
def test_exact_compensation_is_the_optimum(kind: str, pattern: str, solver: str) -> None:
    weight, inputs = slow.problem(kind)
    h, dead = slow.damped(inputs)
    goal = weight.double().masked_fill(dead, 0)
    ours = parse_pass(f"apt:{pattern},mask=wanda,solver={solver}").prune(weight, slow.statistics(inputs))
    wanda = parse_pass(f"wanda:{pattern}").prune(weight, slow.statistics(inputs))
    reference = slow.row_by_row(goal, h, wanda.mask)
    if solver == "cg":  # an iteration: its promise is the objective, and the conditions below
        assert slow.objective(ours.weight, goal, h) <= 1.001 * slow.objective(reference, goal, h) + 1e-12
    else:
        slow.agree(ours.weight, ours.mask & ~dead, reference, wanda.mask & ~dead, goal, h)
    gradient = ((ours.weight.double() - goal) @ h).masked_fill(ours.mask, 0)
    assert gradient.norm() <= 1e-4 * (goal @ h).norm()


@pytest.mark.parametrize("pattern", slow.PATTERNS)
@pytest.mark.parametrize("kind", slow.KINDS)
def test_the_order_of_compensations(kind: str, pattern: str) -> None:
    """For one mask: exact ≤ block, exact ≤ sweep, both ≤ none, in the objective."""
    weight, inputs = slow.problem(kind, columns=256)
    h, dead = slow.damped(inputs)
    goal = weight.double().masked_fill(dead, 0)
    found = {}
    for method in ("none", "sweep", "block", "exact"):
        pruned = parse_pass(f"apt:{pattern},mask=magnitude,compensation={method}").prune(
            weight, slow.statistics(inputs)
        )
        found[method] = slow.objective(pruned.weight, goal, h)
    assert found["exact"] <= found["sweep"] * (1 + 1e-6) and found["exact"] <= found["block"] * (1 + 1e-6)
    assert found["sweep"] < found["none"] and found["block"] < found["none"]


@pytest.mark.parametrize(("kept", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("kind", ["random", "rank-deficient", "dead"])
def test_mask_m_tries_every_candidate(kind: str, kept: int, m: int) -> None:
    weight, inputs = slow.problem(kind, rows=6, columns=32)
    h, dead = slow.damped(inputs)
    ours = APT(NM(kept, m), compensation="none").prune(weight, slow.statistics(inputs))
    reference = slow.best_removal(weight.masked_fill(dead, 0), h, kept, m)
    assert float(((ours.mask | dead) == (reference | dead)).double().mean()) >= 0.999


def test_mask_s_ranks_by_the_loss_of_one_removal() -> None:
    weight, inputs = slow.problem("random")
    h, _ = slow.damped(inputs)
    scores = weight.double().square() / torch.linalg.inv(h).diagonal()
    ours = APT(Unstructured("0.5"), group="layer", compensation="none").prune(weight, slow.statistics(inputs))
    reference = select(scores, Unstructured("0.5"), APT(Unstructured("0.5"), group="layer").comparison)
    assert float((ours.mask == reference).double().mean()) >= 0.999


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("apt:50%,mask=M", "all candidates"),
        ("apt:2:4,mask=wandas", "wanda"),
        ("apt:2:4,mask=twin", "takes its mask from another"),
        ("apt:50%,mask=sparsegpt,group=output", "mask=sparsegpt.*the sweep compares blocks of columns"),
        ("apt:2:4,compensation=none,target=dense", "moves no weight"),
    ],
)
def test_contradictory_options_are_refused(spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        parse_pass(spec)
