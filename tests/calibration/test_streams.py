"""Two streams side by side: which rows belong together, and what does not count."""

from __future__ import annotations

import pytest
import torch
from support.families import build, inputs

import sparsify
from sparsify.calibration.streams import paired
from sparsify.errors import CalibrationError


def test_rows_are_paired_by_expert_and_token() -> None:
    """Expert 0 sees tokens 0, 2 pruned and 2, 3 dense; expert 1 sees 1, 3 and 0, 1."""
    pruned = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    dense = torch.tensor([[12.0], [13.0], [20.0], [21.0]])
    tokens, other = torch.tensor([0, 2, 1, 3]), torch.tensor([2, 3, 0, 1])
    ends = torch.tensor([2, 4])
    found = paired("experts", (pruned, ends, tokens), (dense, ends, other))
    assert found.flatten().tolist() == [0.0, 12.0, 21.0, 3.0]
    with pytest.raises(CalibrationError, match="traced back"):
        paired("experts", (pruned, ends, None), (dense, torch.tensor([1, 4]), None))


def test_a_token_that_only_the_dense_model_has_is_nobody_elses_row() -> None:
    """Expert 0 sees tokens 0, 1 pruned and 0, 4 dense; expert 1 tokens 2, 3 and 2, 3: token 4 is not another's."""
    pruned, dense = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[10.0], [13.0], [12.0]])
    found = paired(
        "experts",
        (pruned, torch.tensor([2, 3]), torch.tensor([0, 1, 0])),
        (dense, torch.tensor([2, 3]), torch.tensor([0, 2, 1])),
    )
    # With a span of the pruned tokens alone, (0, 2) would be taken for (1, 0).
    assert found.flatten().tolist() == [10.0, 1.0, 2.0]


def test_padding_is_left_out_of_both_streams() -> None:
    model = build("llama")
    ids = inputs("llama", rows=2)["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.full((2, 4), 5)], dim=1),
        "attention_mask": torch.cat([torch.ones(2, 16), torch.zeros(2, 4)], dim=1).long(),
    }
    one = sparsify.compile(model, ["twin:2:4,mask=wanda"], calibration=[{"input_ids": ids}])
    other = sparsify.compile(model, ["twin:2:4,mask=wanda"], calibration=[padded])
    for target in one.runs[0].targets:
        torch.testing.assert_close(one.weight(target.parameter), other.weight(target.parameter), rtol=1e-3, atol=1e-4)


def test_little_memory_changes_nothing() -> None:
    model, batch = build("llama"), inputs("llama", rows=4)
    one = sparsify.compile(model, ["twin:2:4"], calibration=[batch])
    other = sparsify.compile(model, ["twin:2:4"], calibration=[batch], memory=3000)
    for target in one.runs[0].targets:
        assert torch.equal(one.weight(target.parameter), other.weight(target.parameter))
