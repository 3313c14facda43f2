from __future__ import annotations

import torch

from sparsify.method.spec import parse_pass
from sparsify.method.statistics import InputStatistics

NOTHING = InputStatistics({}, 0, 0)


def test_unstructured_prunes_the_smallest_of_the_layer() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    pruned = parse_pass("magnitude:30%").prune(weight, NOTHING)
    order = weight.abs().flatten().argsort(stable=True)[: int(240 * 0.3)]
    expected = weight.flatten().clone()
    expected[order] = 0
    assert torch.equal(pruned.weight, expected.view(12, 20))


def test_nm_equals_the_official_loop() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(16, 32, dtype=torch.bool)
    for column in range(0, 32, 4):
        part = weight.abs()[:, column : column + 4]
        mask.scatter_(1, column + part.topk(2, dim=1, largest=False)[1], True)
    assert torch.equal(parse_pass("magnitude:2:4").prune(weight, NOTHING).mask, mask)


def test_a_row_may_be_the_group() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    assert parse_pass("magnitude:50%,group=output").prune(weight, NOTHING).weight.tolist() == [
        [0, 0, 3, 4],
        [0, 0, 30, 40],
    ]
    assert parse_pass("magnitude:50%").prune(weight, NOTHING).weight.tolist() == [
        [0, 0, 0, 0],
        [10, 20, 30, 40],
    ]
