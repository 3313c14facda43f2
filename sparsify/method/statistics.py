"""What a pass sees of one site's calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one site's input, as a pass sees them.

    Attributes:
        values: statistic name to tensor. Of the input X [tokens, in_features], all per sequence (algorithms.md,
            section 1.3): ``squared_norm`` [in_features] is ‖X_j‖², ``absolute_sum`` ‖X_j‖₁, ``sum`` ΣX_j;
            ``absolute_max`` ‖X_j‖_∞; ``gram`` [in_features, in_features] is XᵀX. ``cross_gram`` is X₀ᵀX, where X₀ is
            the same input in the model as it was given and X in the model pruned so far. Of the weight
            [out_features, in_features]: ``gradient_l1``, ``gradient_l2``, ``gradient_platon`` and ``gradient``, see
            :mod:`sparsify.calibration.gradients`. Of the outputs y = XWᵀ + b, summed over tokens, [out_features]:
            ``output_absolute`` Σ|y_i|, ``output_sum``, ``output_square``; ``output_gram`` is YᵀY. ``dense_weight``
            [out_features, in_features] is the weight in the model as it was given, before any pass.
        tokens: rows that were seen; 0 for an expert that no token was routed to.
        sequences: calibration sequences.
        bias: [out_features] of the site where it has one.
        derived: what passes computed from these values, kept so that sites that read one input share it.
    """

    values: Mapping[str, Tensor]
    tokens: int
    sequences: int
    bias: Tensor | None = None
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def squared_norm(self) -> Tensor:
        return self.values["squared_norm"]

    @property
    def gram(self) -> Tensor:
        return self.values["gram"]

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, computed once for all sites that share this input."""
        if key not in self.derived:
            self.derived[key] = make()
        return self.derived[key]
