"""The damped Gram matrix H = XᵀX + λI of a site's input, and its factor: shared by every method that moves weights.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2301.00774),
section 3; algorithms.md, section 5.1. The scale of H changes no result, because damping is relative to its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsify.calibration.statistics import InputStatistics
from sparsify.errors import CalibrationError

# Raised by this much at a time where H will not factor, until λ is a hundred times the mean of the diagonal.
_STEP, _MOST = 10.0, 100.0


@dataclass(frozen=True)
class DampedGram:
    """H and its factor.

    Attributes:
        matrix: H [in_features, in_features] float32, dead inputs given a one on the diagonal.
        factor: U, upper triangular with H⁻¹ = UᵀU. For every j, U_jj² = [(H_{j:,j:})⁻¹]_jj, and row j of U over
            U_jj is the optimal compensation of column j on the columns to its right.
        dead: [in_features], inputs that were zero on every token.
        damping: λ. ``note``: what had to be done to factor H, or None.
    """

    matrix: Tensor
    factor: Tensor
    dead: Tensor
    damping: float
    note: str | None = None

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """[H⁻¹]_jj, [in_features]."""
        return self.factor.square().sum(dim=0)


def damped_gram(statistics: InputStatistics, percdamp: float) -> DampedGram:
    """H from the Gram matrix of ``statistics`` with λ = percdamp · mean(diag), once for all sites that share it.

    Raises:
        CalibrationError: the Gram matrix is not finite or all zero, or does not factor whatever the damping.
    """
    return statistics.once(("gram", percdamp), lambda: _damped(statistics.gram, percdamp))


def _damped(gram: Tensor, percdamp: float) -> DampedGram:
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(gram).all()):
        raise CalibrationError("the Gram matrix", found="NaN or infinity in it", do="Look for broken activations")
    dead = diagonal == 0
    if bool(dead.all()):
        raise CalibrationError(
            "the Gram matrix", found="an input that is zero on every calibration token", do="Use other calibration data"
        )
    # float64: a Gram matrix of few tokens is rank-deficient, and its factor decides masks.
    matrix = gram.double()
    matrix.diagonal()[dead] = 1
    mean = float(matrix.diagonal().mean())
    share, factor = percdamp, None
    plain = matrix.diagonal().clone()
    while share <= _MOST:
        matrix.diagonal().copy_(plain + share * mean)
        if (factor := inverse_factor(matrix)) is not None:
            break
        share = max(share * _STEP, 1e-8)
    if factor is None:
        raise CalibrationError(
            "the Gram matrix", found=f"it does not factor with damping up to {_MOST:g}", do="Use other calibration data"
        )
    note = (
        None
        if share == percdamp
        else f"damping raised from {percdamp:g} to {share:g}: its Gram matrix would not factor"
    )
    return DampedGram(matrix.float(), factor.float(), dead, share * mean, note)


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """U upper triangular with matrix⁻¹ = UᵀU, or None where ``matrix`` is not positive definite.

    One Cholesky factorisation and one triangular inverse: with J the reversal of rows, J·matrix·J = LLᵀ makes
    M = JLJ upper triangular with matrix = MMᵀ, so U = M⁻¹.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    factor = _invert_upper(lower.flip(0, 1))
    return factor if bool(torch.isfinite(factor.diagonal()).all()) else None


def _invert_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves: [A B; 0 D]⁻¹ = [A⁻¹ −A⁻¹BD⁻¹; 0 D⁻¹]."""
    n = len(upper)
    if n <= 256:
        return torch.linalg.solve_triangular(upper, torch.eye(n, dtype=upper.dtype, device=upper.device), upper=True)
    half = n // 2
    result = torch.zeros_like(upper)
    result[:half, :half] = _invert_upper(upper[:half, :half])
    result[half:, half:] = _invert_upper(upper[half:, half:])
    result[:half, half:] = -(result[:half, :half] @ upper[:half, half:]) @ result[half:, half:]
    return result
