"""Evaluations against each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.errors import SpecError
from sparsify.quality.evaluation import Judged

IDS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(1))


def test_the_losses_are_those_of_transformers(folder: Callable[[str], Path]) -> None:
    """One for each window, in their order, whatever batches they were run in; perplexity is their mean's."""
    model, found = sparsify.load(folder("llama")), sparsify.evaluate(folder("llama"), IDS)
    with torch.no_grad():
        slow = [
            float(torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:])) for row in IDS
        ]
    assert found.losses == pytest.approx(slow, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(statistics.fmean(found.losses)), rel=1e-12)
    assert "losses" not in repr(found) and "losses" not in found.as_dict()


def test_two_evaluations_are_compared(folder: Callable[[str], Path]) -> None:
    dense = sparsify.evaluate(folder("llama"), IDS)
    pruned = sparsify.evaluate(sparsify.compile(folder("llama"), "magnitude:2:4"), IDS)
    paired = pruned.against(dense)
    assert paired.ratio == pytest.approx(pruned.perplexity / dense.perplexity, rel=1e-12)
    differences = [one - other for one, other in zip(pruned.losses, dense.losses, strict=True)]
    assert paired.standard_error == pytest.approx(statistics.stdev(differences) / math.sqrt(6), rel=1e-9)
    assert Judged(dense, pruned).as_dict()["standard_error"] == paired.standard_error
    assert dense.against(dense).level == "none"


def test_other_windows_are_not_compared(folder: Callable[[str], Path]) -> None:
    """As many, as long, and of the same name; only the tokens tell."""
    dense = sparsify.evaluate(folder("llama"), IDS)
    for other in (IDS.flip(0), IDS[:5], IDS.reshape(12, 8)):
        with pytest.raises(SpecError, match="comparing two evaluations: other windows"):
            sparsify.evaluate(folder("llama"), other).against(dense)
    with pytest.raises(SpecError, match="other windows"):
        dense.against(replace(dense, losses=dense.losses[:2]))
    same = sparsify.evaluate(folder("llama"), IDS.int())
    assert same.against(dense).ratio == 1
