"""What is recorded of an input is the input's own."""

from __future__ import annotations

import torch

from sparsify.calibration.recorder import GroupRecorder


def test_the_recorded_gram_matrix_is_the_inputs_own() -> None:
    for features in (3, 64, 65, 300):
        rows = torch.randn(40, features)
        dense = torch.randn(40, features)
        recorder = GroupRecorder(("gram", "cross_gram", "sum"), 2, features, torch.device("cpu"))
        recorder.update(rows[:20], torch.tensor([12, 20]), dense[:20])
        recorder.update(rows[20:], torch.tensor([0, 20]), dense[20:])
        for expert, index in ((0, slice(0, 12)), (1, slice(12, 40))):
            stats, x, y = recorder.statistics(expert, 4), rows[index].double(), dense[index].double()
            torch.testing.assert_close(stats.gram.double(), x.T @ x / 4, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(stats.values["cross_gram"].double(), y.T @ x / 4, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(stats.values["sum"], x.sum(dim=0) / 4, rtol=1e-5, atol=1e-5)
