"""The damped Gram matrix: factored once, its damping raised where it must be, refused where nothing helps."""

from __future__ import annotations

import pytest
import torch
from support import slow

from sparsify.errors import CalibrationError
from sparsify.method.pattern import NM
from sparsify.passes import SparseGPT
from sparsify.passes.solvers import gram
from sparsify.passes.solvers.gram import damped_gram, upper_root


def test_siblings_share_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(gram, "upper_root", lambda matrix: calls.append(1) or upper_root(matrix))
    weight, inputs = slow.problem("random")
    stats = slow.statistics(inputs)
    for w in (weight, weight + 1, weight[:4]):
        SparseGPT(NM(2, 4)).prune(w, stats)
    assert len(calls) == 1


def test_damping_is_raised_step_by_step_and_said() -> None:
    weight, inputs = slow.problem("rank-deficient")
    stats = slow.statistics(inputs)
    # A Gram matrix that rounding made indefinite.
    stats.values["gram"].diagonal().sub_(0.05 * float(stats.values["gram"].diagonal().mean()))  # type: ignore[attr-defined]
    pruned = SparseGPT(NM(2, 4), percdamp=0.001).prune(weight, stats)
    assert pruned.notes == ("damping raised from 0.001 to 0.1: its Gram matrix would not factor",)
    assert pruned.weight.isfinite().all()
    assert damped_gram(slow.statistics(inputs), 0.01).note is None


def test_broken_gram_matrices_are_refused() -> None:
    weight, inputs = slow.problem("random")
    stats = slow.statistics(inputs)
    stats.gram[3, 5] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        SparseGPT(NM(2, 4)).prune(weight, stats)
    with pytest.raises(CalibrationError, match="zero on every calibration token"):
        SparseGPT(NM(2, 4)).prune(weight, slow.statistics(torch.zeros(8, 64, dtype=torch.float64)))
    hopeless = slow.statistics(inputs)
    hopeless.gram.copy_(-torch.eye(64))
    with pytest.raises(CalibrationError, match="does not factor"):
        SparseGPT(NM(2, 4)).prune(weight, hopeless)
