"""A 2:4 weight in the layouts of the GPU that it lies on, with the plan of which kernel serves how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsify.errors import Refused
from sparsify.runtime.cuda import compressed as libraries
from sparsify.runtime.cuda import ops
from sparsify.runtime.cuda.autotune.times import timings_of
from sparsify.runtime.cuda.dispatch import Plan, Timings, default_plan, integer_plan
from sparsify.runtime.cuda.gpu import FEW_BITS, GPU
from sparsify.runtime.cuda.integers import grid_of, pack_fragments, unpack_fragments
from sparsify.runtime.layout import Packed
from sparsify.runtime.words import Layout, Policy, check_policy

T = TypeVar("T")
# The code of a refusal that another compiler would lift: the portable layout serves meanwhile.
NO_COMPILER = "no-compiler"


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A matrix [rows, columns] on a GPU.

    Attributes:
        fragments: for few tokens (:mod:`sparsify.runtime.cuda.fragments`, of integers
            :mod:`sparsify.runtime.cuda.integers`); None under the policy ``prefill``.
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

    layout: ClassVar[Layout] = "packed24"
    operator: ClassVar[OpOverload[..., Tensor]] = ops.linear_24_prepared

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"fragments": self.fragments, "compressed": self.compressed, "codes": self.codes}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def arguments(self, held: Mapping[str, T]) -> tuple[T | int | str | None, ...]:
        """What the operator takes between ``x`` and the bias, with ``held`` in the place of :attr:`tensors`."""
        return (*(held.get(name) for name in ("fragments", "compressed", "codes")), self.rows, str(self.plan))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., columns] times the matrix: [..., rows]."""
        return self.operator(x, *self.arguments(self.tensors), bias)

    def portable(self) -> Packed:
        """The matrix in packed24 again, on its device, as it was packed."""
        if self.fragments is not None:
            return unpack_fragments(self.fragments, self.dtype, self.rows, self.columns)
        assert self.compressed is not None, "a prepared weight has one copy at least"
        return libraries.decompress(self.compressed, self.codes, (self.rows, self.columns))


def prepare_weight(
    packed: Packed, policy: Policy = "decode", *, tune: bool = True, target: GPU | None = None
) -> PreparedWeight | Refused:
    """Bring a packed24 matrix on a GPU, of full width or of integers, into the layouts of that GPU, or say why it is
    better left as it is or dense.

    Nothing of the size of the dense matrix stays; while cuSPARSELt's copy is made one does.

    Args:
        tune: take the plan from times measured on this GPU, once per shape, dtype and policy
            (:mod:`sparsify.runtime.cuda.autotune.times`); else from ``dispatch.default_plan``.
        target: a GPU to prepare for, in the place of the one that ``packed`` lies on; nothing is measured for it.

    Raises:
        SpecError: another policy. BackendError: the kernels do not compile or load here.
    """
    check_policy(policy)
    device, (rows, columns), dtype = packed.values.device, packed.shape, packed.dtype
    where = target or GPU.of(device)
    grid = grid_of(packed)
    if (reason := where.unfit(dtype, packed.layout)) is not None:
        return Refused(reason)
    if grid is not None and policy != "decode":
        return Refused(f"{FEW_BITS} under the policy {policy!r}")
    library = where.library_for(policy)
    unfit = None if library is None else libraries.unfit(library, rows, columns)
    if policy == "prefill" and (library is None or unfit is not None):
        return Refused(unfit or "this build of torch has no cuSPARSELt, which the policy 'prefill' needs")
    if unfit is not None:
        library = None
    if policy != "prefill" and not where.compiler:
        return Refused("no NVRTC here to compile the kernels with", code=NO_COMPILER)
    timings = Timings({})
    if tune and target is None:
        timings = timings_of(rows, columns, dtype, policy, library, device, grid)
        if not timings.pays(policy):
            return Refused(f"dense is faster here ({timings.verdict(policy)})")
    if timings.micro:
        plan = timings.plan()
    elif grid is not None:
        plan = integer_plan(grid)
    else:
        plan = default_plan(rows, columns, policy, library, where.multiprocessors, where.capability)
    fragments = pack_fragments(packed) if policy != "prefill" else None
    held, codes = libraries.compress(packed, library) if library is not None else (None, None)
    return PreparedWeight(rows, columns, dtype, fragments, held, codes, plan, timings)
