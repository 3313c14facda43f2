"""The damped Gram matrix H = XᵀX + λI of a site's input, and its factor: shared by every method that moves weights.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2301.00774),
section 3; algorithms.md, section 5.1. The scale of H changes no result, because damping is relative to its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsify.errors import CalibrationError
from sparsify.method.statistics import InputStatistics
from sparsify.tensors import all_finite

# Raised by this much at a time where H will not factor, until λ is a hundred times the mean of the diagonal.
_STEP, _MOST = 10.0, 100.0
# Triangular matrices up to this width are inverted by one solve, wider ones by halves.
_DIRECT = 256


@dataclass(frozen=True)
class DampedGram:
    """H and its factors.

    Attributes:
        matrix: H [in_features, in_features] float32, dead inputs given a one on the diagonal.
        root: M, upper triangular with H = MMᵀ, float32. A change δ of one row of weights costs ‖δM‖², and entry j of
            δM holds the changes of columns up to j alone.
        dead: [in_features], inputs that were zero on every token.
        note: what had to be done to factor H, or None.
    """

    matrix: Tensor
    root: Tensor
    dead: Tensor
    note: str | None = None

    @cached_property
    def inverse_root(self) -> Tensor:
        """U = M⁻¹, upper triangular with H⁻¹ = UᵀU, float32; for every j, U_jj² = [(H_{j:,j:})⁻¹]_jj."""
        return invert_upper(self.root.double()).float()

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """[H⁻¹]_jj, [in_features]."""
        return self.inverse_root.square().sum(dim=0)


def damped_gram(statistics: InputStatistics, percdamp: float) -> DampedGram:
    """H from the Gram matrix of ``statistics`` with λ = percdamp · mean(diag), once for all sites that share it.

    Raises:
        CalibrationError: the Gram matrix is not finite or all zero, or does not factor whatever the damping.
    """
    return statistics.once(("gram", percdamp), lambda: _damped(statistics.gram, percdamp))


def _damped(gram: Tensor, percdamp: float) -> DampedGram:
    diagonal = gram.diagonal()
    if not all_finite(gram):
        raise CalibrationError("the Gram matrix", found="NaN or infinity in it", do="Look for broken activations")
    dead = diagonal == 0
    if bool(dead.all()):
        raise CalibrationError(
            "the Gram matrix",
            found="an input that is zero on every calibration token",
            do="Huge weights before it do that too: is the checkpoint sound? Else use other calibration data, or leave "
            "it out with --ignore",
        )
    # float64: a Gram matrix of few tokens is rank-deficient, and its factor decides masks.
    matrix = gram.to(torch.float64, copy=True)
    matrix.diagonal()[dead] = 1
    mean = float(matrix.diagonal().mean())
    share, root = percdamp, None
    plain = matrix.diagonal().clone()
    while share <= _MOST:
        matrix.diagonal().copy_(plain + share * mean)
        if (root := upper_root(matrix)) is not None:
            break
        share = max(share * _STEP, 1e-8)
    if root is None:
        raise CalibrationError(
            "the Gram matrix", found=f"it does not factor with damping up to {_MOST:g}", do="Use other calibration data"
        )
    raised = f"damping raised from {percdamp:g} to {share:g}: its Gram matrix would not factor"
    return DampedGram(matrix.float(), root.float(), dead, None if share == percdamp else raised)


def upper_root(matrix: Tensor) -> Tensor | None:
    """M upper triangular with matrix = MMᵀ, or None where ``matrix`` is not positive definite.

    With J the reversal of rows, J·matrix·J = LLᵀ makes M = JLJ upper triangular.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    return lower.flip(0, 1)


def invert_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves: [A B; 0 D]⁻¹ = [A⁻¹ −A⁻¹BD⁻¹; 0 D⁻¹]."""
    n = len(upper)
    if n <= _DIRECT:
        return torch.linalg.solve_triangular(upper, torch.eye(n, dtype=upper.dtype, device=upper.device), upper=True)
    half = n // 2
    result = torch.zeros_like(upper)
    result[:half, :half] = invert_upper(upper[:half, :half])
    result[half:, half:] = invert_upper(upper[half:, half:])
    result[:half, half:] = -(result[:half, :half] @ upper[:half, half:]) @ result[half:, half:]
    return result
