"""A 2:4 weight in the layouts of the GPU that it lies on, with the plan of which kernel serves how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import Refused, SpecError
from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda import ops
from sparsify.runtime.cuda.autotune import Cache, Clock, GPUClock, Weights, measure
from sparsify.runtime.cuda.compressed import Library
from sparsify.runtime.cuda.dispatch import POLICIES, Plan, Policy, Timings, default_plan
from sparsify.runtime.cuda.fragments import DTYPES, from_fragments, to_fragments
from sparsify.runtime.cuda.nvrtc import nvrtc
from sparsify.runtime.layout import Packed, padded, unpack

# The sparse tensor cores begin with Ampere.
OLDEST = (8, 0)
# The code of a refusal that another compiler would lift: the portable layout serves meanwhile.
NO_COMPILER = "no-compiler"


@dataclass(frozen=True)
class Target:
    """What of a GPU decides how a weight is kept on it.

    Attributes:
        capability: (major, minor). compiler: whether NVRTC is there. library: of the compressed copies; None where
            torch was built without it.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    compiler: bool
    library: Library | None

    @classmethod
    def of(cls, device: torch.device) -> Target:
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        library: Library | None = libraries.library_of(capability)
        built = getattr(torch.backends, "cusparselt", None)
        if library == "cusparselt" and (built is None or not built.is_available()):
            library = None
        return cls(properties.name, capability, properties.multi_processor_count, nvrtc() is not None, library)

    def unfit(self, dtype: torch.dtype, layout: str = "packed24") -> str | None:
        """Why no kernel of this GPU takes a weight of ``dtype`` packed as ``layout``, or None."""
        if layout != "packed24":
            return "not 2:4, the only sparsity that GPUs multiply"
        if dtype not in DTYPES:
            return f"{str(dtype).removeprefix('torch.')}, and 2:4 kernels take bfloat16 and float16"
        if self.capability < OLDEST:
            return f"{self.name} has no sparse tensor cores (compute capability 8.0 and later have)"
        return None


def current_gpu() -> torch.device | None:
    """The GPU in use; None where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A matrix [rows, columns] on a GPU.

    Attributes:
        fragments: for few tokens (:mod:`sparsify.runtime.cuda.fragments`); None under the policy ``prefill``.
        compressed, codes: for many (:mod:`sparsify.runtime.cuda.compressed`); None under ``decode``.
        timings: what the plan was made of; empty where nothing was measured.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    fragments: Tensor | None
    compressed: Tensor | None
    codes: Tensor | None
    plan: Plan
    timings: Timings

    layout = "packed24"
    operator = ops.linear_24_prepared

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"fragments": self.fragments, "compressed": self.compressed, "codes": self.codes}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def arguments(self, held: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the operator takes between ``x`` and the bias, with ``held`` in the place of :attr:`tensors`."""
        return (*(held.get(name) for name in ("fragments", "compressed", "codes")), self.rows, str(self.plan))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., columns] times the matrix: [..., rows]."""
        result: Tensor = self.operator(x, *self.arguments(self.tensors), bias)
        return result

    def portable(self) -> Packed:
        """The matrix in packed24 again, on its device, as it was packed."""
        if self.fragments is not None:
            return from_fragments(self.fragments, self.dtype, self.rows, self.columns)
        assert self.compressed is not None, "a prepared weight has one copy at least"
        return libraries.decompress(self.compressed, self.codes, (self.rows, self.columns))


def prepare(
    packed: Packed, policy: Policy = "decode", *, tune: bool = True, target: Target | None = None
) -> PreparedWeight | Refused:
    """Bring a packed24 matrix on a GPU into the layouts of that GPU, or say why it is better left as it is or dense.

    Nothing of the size of the dense matrix stays; while cuSPARSELt's copy is made one does.

    Args:
        tune: take the plan from times measured on this GPU, once per shape, dtype and policy (see
            :class:`sparsify.runtime.cuda.autotune.Cache`); else from :func:`sparsify.runtime.cuda.dispatch.default_plan`.
        target: a GPU to prepare for, in the place of the one that ``packed`` lies on; nothing is measured for it.

    Raises:
        SpecError: another policy. BackendError: the kernels do not compile or load here.
    """
    if policy not in POLICIES:
        raise SpecError(f"the policy {policy!r}", found="no such policy", do=f"Take {', '.join(POLICIES)}")
    device, (rows, columns), dtype = packed.values.device, packed.shape, packed.values.dtype
    where = target or Target.of(device)
    if (reason := where.unfit(dtype, packed.layout)) is not None:
        return Refused(reason)
    library = where.library if policy != "decode" else None
    unfit = None if library is None else libraries.unfit(library, rows, columns)
    if policy == "prefill" and (library is None or unfit is not None):
        return Refused(unfit or "this build of torch has no cuSPARSELt, which the policy 'prefill' needs")
    if unfit is not None:
        library = None
    if policy != "prefill" and not where.compiler:
        return Refused("no NVRTC here to compile the kernels with", code=NO_COMPILER)
    timings = Timings({})
    if tune and target is None:
        timings = timings_of(rows, columns, dtype, policy, library, device)
        if not timings.pays(policy):
            return Refused(f"dense is faster here ({timings.verdict(policy)})")
    plan = timings.plan() if timings.micro else default_plan(rows, columns, policy, library, where.multiprocessors)
    fragments = to_fragments(packed) if policy != "prefill" else None
    held, codes = libraries.compress(packed, library) if library is not None else (None, None)
    return PreparedWeight(rows, columns, dtype, fragments, held, codes, plan, timings)


@cache
def timings_of(
    rows: int, columns: int, dtype: torch.dtype, policy: Policy, library: Library | None, device: torch.device
) -> Timings:
    """What every kernel that ``policy`` allows takes on ``device``: from the cache folder, or measured now."""
    store = Cache.of(device)
    key = f"{rows}x{columns}:{str(dtype).removeprefix('torch.')}:{policy}:{library or 'none'}"
    found = store.get(key)
    if found is None:
        found = race(rows, columns, dtype, policy, library, device, GPUClock(device))
        store.put(key, found)
    return found


def race(
    rows: int, columns: int, dtype: torch.dtype, policy: Policy, library: Library | None, device: torch.device,
    clock: Clock,
) -> Timings:  # fmt: skip
    """Time the kernels on a random 2:4 matrix."""
    packed = random_24(rows, columns, dtype, device)
    held, codes = libraries.compress(packed, library) if library is not None else (None, None)
    fragments = to_fragments(packed) if policy != "prefill" else None
    return measure(Weights(unpack(packed), fragments, held, codes), ops.product, clock)


def random_24(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Packed:
    """A random matrix with two values of every four."""
    generator = torch.Generator(device).manual_seed(0)
    full = padded(columns)
    values = torch.randn(rows, full // 2, generator=generator, device=device).to(dtype)
    # The six ways to choose two positions of four.
    nibbles = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8, device=device)
    chosen = nibbles[torch.randint(6, (rows, full // 4), generator=generator, device=device)]
    # A group that is cut off by the edge, and those beyond it, stay empty.
    values[:, columns // 4 * 2 :] = 0
    return Packed("packed24", (rows, columns), values, chosen[:, ::2] | chosen[:, 1::2] << 4)
