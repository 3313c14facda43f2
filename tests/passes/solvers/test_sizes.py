"""Both sides of every size at which a solver takes another way."""

from __future__ import annotations

import pytest
import torch
from support import slow

from sparsify.method.pattern import NM, Unstructured
from sparsify.method.spec import parse_pass
from sparsify.passes import SparseGPT, apt
from sparsify.passes.solvers import exact, fitting, gram, sweep
from sparsify.passes.solvers.exact import conjugate_gradients, solve_rows
from sparsify.passes.solvers.gram import damped_gram, invert_upper
from sparsify.passes.solvers.sweep import block_update


def upper(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64).triu()
    return matrix / size**0.5 + torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, gram._DIRECT, gram._DIRECT + 1, 2 * gram._DIRECT + 3])
def test_the_inverse_by_halves(size: int) -> None:
    matrix = upper(size)
    torch.testing.assert_close(invert_upper(matrix) @ matrix, torch.eye(size, dtype=torch.float64))


def test_the_inverse_by_halves_down_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_DIRECT", 1)
    for size in range(1, 12):
        torch.testing.assert_close(invert_upper(upper(size)), torch.linalg.inv(upper(size)))


def test_damping_is_a_share_of_the_mean_diagonal_dead_inputs_counted_as_one() -> None:
    """The official code: H[dead, dead] = 1, then λ = percdamp · mean(diag H), dead inputs in it."""
    _, inputs = slow.problem("dead")
    inputs = inputs * 30
    stats = slow.statistics(inputs)
    h, dead = slow.damped(inputs, 0.05)
    found = damped_gram(stats, 0.05)
    assert torch.equal(found.dead, dead) and 0 < int(dead.sum()) < len(dead)
    torch.testing.assert_close(found.matrix.double(), h, rtol=1e-6, atol=1e-6 * float(h.max()))
    inverse = torch.linalg.inv(h)
    torch.testing.assert_close(found.inverse_diagonal.double(), inverse.diagonal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("width", [1, 2, 5, sweep._SMALL, sweep._SMALL + 1, 64, 70, 71])
def test_the_mask_is_chosen_block_by_block_the_last_one_smaller(width: int) -> None:
    """Blocks that do not divide the 70 columns, narrow ones inverted beforehand and wide ones solved."""
    weight, inputs = slow.problem("random", rows=10, columns=70)
    h, dead = slow.damped(inputs)
    pruned = SparseGPT(Unstructured("0.5"), blocksize=width).prune(weight, slow.statistics(inputs))
    reference, mask = slow.column_by_column(weight, h, dead, "50%", slow.obs_scores, blocksize=width)
    assert torch.equal(pruned.mask, mask)
    assert slow.close(pruned.weight, reference)


@pytest.mark.parametrize("rows", [4, 5, 6, 11])
def test_joint_updates_take_some_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_ROWS", 5)
    weight, inputs = slow.problem("random", rows=rows, columns=24)
    h, _ = slow.damped(inputs)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(rows)) < 0.5
    inverse_root = damped_gram(slow.statistics(inputs), 0.01).inverse_root
    for blocksize in (7, 24, 100):
        ours = block_update(weight, inverse_root, mask, blocksize)
        assert slow.close(ours, slow.block_by_block(weight, h, mask, blocksize))


@pytest.mark.parametrize("held", [1, 8 * 24 * 24 * 3, 1 << 28])
def test_exact_rows_take_as_many_at_a_time_as_fit(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_CHUNK", held)
    weight, inputs = slow.problem("random", rows=9, columns=24)
    h, _ = slow.damped(inputs)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1.1, 9).view(-1, 1)
    assert slow.close(solve_rows(weight, h, mask), slow.row_by_row(weight, h, mask), 1e-9)


@pytest.mark.parametrize("features", [7, 63, 64, 65, 1024])
def test_conjugate_gradients_take_some_features_at_a_time(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the preconditioner is summed up it is the same one: the same steps give the same weights."""
    weight, inputs = slow.problem("ill-conditioned", rows=6)
    h, _ = slow.damped(inputs)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    start = weight.masked_fill(mask, 0)
    whole = conjugate_gradients(weight, h.float(), mask, start, most=3)
    monkeypatch.setattr(exact, "_FEATURES", features)
    assert slow.close(conjugate_gradients(weight, h.float(), mask, start, most=3), whole.double())
    reference = slow.row_by_row(weight, h, mask)
    ours = conjugate_gradients(weight, h.float(), mask, start)
    assert slow.objective(ours, weight, h) <= 1.001 * slow.objective(reference, weight, h)


def test_solver_auto_changes_at_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = slow.problem("random")
    stats = slow.statistics(inputs)
    found = {s: parse_pass(f"apt:2:4,mask=wanda,solver={s}").prune(weight, stats).weight for s in ("cholesky", "cg")}
    assert not torch.equal(found["cholesky"], found["cg"])
    for limit, solver in ((64, "cholesky"), (63, "cg")):
        monkeypatch.setattr(fitting, "_CHOLESKY_UP_TO", limit)
        ours = parse_pass("apt:2:4,mask=wanda").prune(weight, slow.statistics(inputs)).weight
        assert torch.equal(ours, found[solver]), solver


@pytest.mark.parametrize("weights", [1, 32 * 5, 1 << 24])
def test_mask_m_compares_some_rows_at_a_time(weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = slow.problem("random", rows=12, columns=32)
    stats = slow.statistics(inputs)
    whole = apt.APT(NM(2, 4), compensation="none").prune(weight, stats).mask
    monkeypatch.setattr(apt, "_WEIGHTS", weights)
    assert torch.equal(apt.APT(NM(2, 4), compensation="none").prune(weight, stats).mask, whole)
    h, _ = slow.damped(inputs)
    assert torch.equal(whole, slow.best_removal(weight, h, 2, 4))


@pytest.mark.parametrize("columns", [127, 128, 129, 300])
@pytest.mark.parametrize("spec", ["wanda:50%,update=block", "magnitude:50%,update=iterative"])
def test_updates_in_blocks_of_128_columns(spec: str, columns: int) -> None:
    weight, inputs = slow.problem("random", rows=5, columns=columns)
    h, dead = slow.damped(inputs)
    stats = slow.statistics(inputs)
    ours = parse_pass(spec).prune(weight, stats)
    if spec.startswith("wanda"):
        mask = parse_pass("wanda:50%").prune(weight, stats).mask
        reference = slow.block_by_block(weight, h, mask, 128)
    else:
        reference, mask = slow.column_by_column(weight, h, dead, "50%", lambda columns, first, diagonal: columns.abs())
    assert torch.equal(ours.mask, mask) and slow.close(ours.weight, reference)


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03, 1e-2])
def test_conjugate_gradients_stop_once_a_step_gains_less_than_its_share(tolerance: float) -> None:
    """Of the objective that is left, which each step lowers; counted by runs of one step more each."""
    weight, inputs = slow.problem("ill-conditioned", rows=6)
    h, _ = slow.damped(inputs)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    start = weight.masked_fill(mask, 0)

    def after(**how: float) -> torch.Tensor:
        return conjugate_gradients(weight, h.float(), mask, start, rank=1, **how)  # type: ignore[arg-type]

    runs = [start, *(after(tolerance=0, most=steps) for steps in range(1, 25))]
    left = [slow.objective(run, weight, h) for run in runs]
    stop = next(n for n in range(1, len(left)) if left[n - 1] - left[n] <= tolerance * left[n])
    assert torch.equal(after(tolerance=tolerance), runs[stop])
