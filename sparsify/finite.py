"""Whether a tensor holds a NaN or an infinity, at the cost of one sum."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether all of ``values`` are finite. A sum of finite numbers may overflow; only then is each looked at."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return bool(values.sum(dtype=dtype).isfinite()) or bool(values.isfinite().all())
