"""The GPUs that weights are prepared for, whether they are here or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.runtime.cuda.compressed import SparseLibrary, library_of
from sparsify.runtime.cuda.fragments import DTYPES
from sparsify.runtime.cuda.nvrtc import nvrtc
from sparsify.runtime.cuda.variants import HOPPER
from sparsify.runtime.words import Layout, Policy

# The sparse tensor cores begin with Ampere.
OLDEST = (8, 0)
# Why such weights stay dense on a GPU.
NOT_24 = "not 2:4, the only sparsity that GPUs multiply"
FEW_BITS = "values of 8 or 4 bits, for which there is no GPU kernel"
NO_EXPERTS = "a stack of experts, for which there is no GPU kernel"


@dataclass(frozen=True)
class GPU:
    """What of a GPU decides how a weight is kept on it.

    Attributes:
        capability: (major, minor). compiler: whether NVRTC is there. library: of the compressed copies; None where
            torch was built without it.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    compiler: bool
    library: SparseLibrary | None

    @classmethod
    def of(cls, device: torch.device) -> GPU:
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        library: SparseLibrary | None = library_of(capability)
        built = getattr(torch.backends, "cusparselt", None)
        if library == "cusparselt" and (built is None or not built.is_available()):
            library = None
        return cls(properties.name, capability, properties.multi_processor_count, nvrtc() is not None, library)

    @property
    def hopper(self) -> bool:
        """Whether it has clusters, bulk copies and early starts."""
        return self.capability >= HOPPER

    def unfit(self, dtype: torch.dtype, layout: Layout = "packed24") -> str | None:
        """Why no kernel of this GPU takes a weight of ``dtype`` packed as ``layout``, or None."""
        if layout != "packed24":
            return NOT_24
        if dtype not in DTYPES:
            return f"{str(dtype).removeprefix('torch.')}, and 2:4 kernels take bfloat16 and float16"
        if self.capability < OLDEST:
            return f"{self.name} has no sparse tensor cores (compute capability 8.0 and later have)"
        return None

    def unfit_integers(self, dtype: torch.dtype, policy: Policy) -> str | None:
        """The same of a 2:4 weight of integers under ``policy``: cuSPARSELt's copies are of full width."""
        if policy != "decode":
            return f"{FEW_BITS} under the policy {policy!r}"
        if not self.compiler:
            return f"{FEW_BITS} without NVRTC"
        return self.unfit(dtype)

    def library_for(self, policy: Policy) -> SparseLibrary | None:
        """The library of the copies that ``policy`` keeps for many tokens; None where it keeps none."""
        return self.library if policy != "decode" else None


def current_gpu() -> torch.device | None:
    """The GPU in use; None where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
