"""What is recorded of an input is the input's own."""

from __future__ import annotations

import pytest
import torch

from sparsify.calibration.recorder import GroupRecorder, OutputSketch

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("batches", [(300,), (256,), (257,), (100, 100, 100, 7), (600, 1)])
def test_both_models_rows_are_combined_alike_however_many_there_are(batches: tuple[int, ...]) -> None:
    """Past 256 tokens rows are added up with signs, the same ones in both: it is a linear map of all rows."""
    size = OutputSketch(1, 1, CPU).size
    assert size == 256
    rows, dense = torch.randn(sum(batches), 6), torch.randn(sum(batches), 6)
    twin, one, other = OutputSketch(1, 6, CPU, twin=True), OutputSketch(1, 6, CPU), OutputSketch(1, 6, CPU)
    for part, beside in zip(rows.split(list(batches)), dense.split(list(batches)), strict=True):
        twin.update(0, part, beside)
        one.update(0, part, part)
        other.update(0, beside, beside)
    torch.testing.assert_close(twin.rows, one.rows)
    torch.testing.assert_close(twin.dense, other.rows)
    weight, pruned = torch.randn(4, 6), torch.randn(4, 6)
    lost, whole = twin.error(0, weight, pruned)
    exact = float((dense @ weight.t() - rows @ pruned.t()).square().sum()), float((dense @ weight.t()).square().sum())
    if len(rows) <= size:
        assert (lost, whole) == pytest.approx(exact, rel=1e-4)
    else:
        assert (lost, whole) == pytest.approx(exact, rel=0.5), "an estimate"


def test_the_sketch_is_no_estimate_up_to_its_size_and_adds_up_past_it() -> None:
    """Each row lands once: as many as there are places keep their norms, the next one is added to the first."""
    rows = torch.eye(33)
    sketch = OutputSketch(8, 33, CPU)
    assert sketch.size == 32, "a stack of experts shares the rows, with 32 for each at least"
    sketch.update(5, rows[:32], rows[:32])
    assert torch.equal(sketch.rows[5].abs(), rows[:32]) and not sketch.rows[4].any()
    sketch.update(5, rows[32:], rows[32:])
    assert torch.equal(sketch.rows[5].abs()[0], rows[0] + rows[32])
    assert sketch.error(4, torch.ones(2, 33), torch.zeros(2, 33)) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["absolute_sum", "absolute_max", "squared_norm"])
def test_statistics_of_single_features_over_batches(name: str) -> None:
    rows = torch.randn(40, 5)
    recorder = GroupRecorder((name,), 1, 5, CPU)
    for part in rows.split(16):
        assert recorder.update(part)
    found = recorder.statistics(0, 4).values[name]
    expected = {
        "absolute_sum": rows.abs().sum(0) / 4,
        "absolute_max": rows.abs().amax(0),
        "squared_norm": rows.square().sum(0) / 4,
    }
    torch.testing.assert_close(found.float(), expected[name])


def test_a_batch_that_is_not_finite_in_either_model_is_told() -> None:
    rows, broken = torch.randn(4, 3), torch.full((4, 3), torch.nan)
    assert GroupRecorder(("gram",), 1, 3, CPU).update(rows, None, rows.clone())
    assert not GroupRecorder(("gram",), 1, 3, CPU).update(broken)
    assert not GroupRecorder(("gram",), 1, 3, CPU, twin=True).update(rows, None, broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_those_of_all_rows_of_a_long_batch(dtype: torch.dtype) -> None:
    """They are taken a few hundred rows at a time."""
    rows = torch.randn(1000, 5).to(dtype)
    recorder = GroupRecorder(("squared_norm", "absolute_sum", "sum", "absolute_max"), 1, 5, CPU)
    recorder.update(rows)
    stats, exact = recorder.statistics(0, 1).values, rows.double()
    torch.testing.assert_close(stats["squared_norm"], exact.square().sum(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats["absolute_sum"], exact.abs().sum(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats["sum"], exact.sum(dim=0), rtol=0, atol=1e-3)
    assert torch.equal(stats["absolute_max"], exact.abs().amax(dim=0))
