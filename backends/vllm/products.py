"""What a layer multiplies with: its matrices joined where they are packed alike, in the layouts of the device.

A layer of vLLM's may be fused of matrices that are packed in several ways, or not at all: neighbours of one layout make
one product, and the results stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.logger import init_logger

from sparsify.backends.vllm.beside import Beside, Copies, linear_beside
from sparsify.errors import Refused
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.prepared import NO_COMPILER, PreparedWeight, prepare_weight
from sparsify.runtime.layout import Packed, concatenate, pack, unpack
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import Policy

logger = init_logger(__name__)


@dataclass(frozen=True)
class OnDevice:
    """How weights are kept: where, for which numbers of tokens on a GPU, and whether inputs of few bits stay exact.

    Attributes:
        target: a GPU to prepare for, in the place of the one that weights lie on; a plain reference then runs them.
        copies: on CPUs, who makes dense copies beside packed weights; None: none is kept.
    """

    device: torch.device
    exact: bool = False
    policy: Policy = "decode"
    tune: bool = True
    target: GPU | None = None
    copies: Copies | None = None


@dataclass(frozen=True)
class _Held:
    """An argument that is a tensor of the layer."""

    name: str


@dataclass(frozen=True)
class Product:
    """An operator, and what it takes between ``x`` and what comes last: a bias, or of experts the offsets.

    Attributes:
        behind: what the operator finds by an argument, and nobody else holds.
    """

    operator: Any
    arguments: tuple[Any, ...]
    behind: Any = None

    def __call__(self, layer: Any, x: Tensor, last: Tensor | None) -> Tensor:
        given = [getattr(layer, a.name) if isinstance(a, _Held) else a for a in self.arguments]
        y: Tensor = self.operator(x, *given, last)
        return y


def hold(layer: nn.Module, name: str, matrices: Sequence[Packed | Tensor], how: OnDevice) -> list[Product]:
    """Give ``layer`` the tensors of ``matrices``, whose rows follow each other; the first of them is its ``weight``.

    Args:
        name: of the layer, for what is told.
    """
    products: list[Product] = []
    for _, alike in groupby(matrices, key=_kind):
        weight = settled(name, joined(list(alike)), how)
        own = f"weight_{len(products)}" if products else "weight"
        products.append(product_of(layer, weight, own))
        both = how.copies.beside(name, weight) if how.copies is not None and isinstance(weight, PackedWeight) else None
        if both is not None:
            products[-1] = _product_of_both(layer, both, own)
    return products


def product_of(layer: nn.Module, weight: PackedWeight | PreparedWeight | Tensor, name: str) -> Product:
    """Give ``layer`` the tensors of ``weight``, the first of them as ``name``, a parameter: the rest are buffers."""
    tensors = {"": weight} if isinstance(weight, Tensor) else weight.tensors
    # Of few bits the scales come first, as in files: who asks a layer's weight for its dtype is answered.
    held = {each: _Held(f"{name}_{each}" if at else name) for at, each in enumerate(tensors)}
    for each, tensor in tensors.items():
        if held[each].name == name:
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            layer.register_buffer(held[each].name, tensor, persistent=False)
    if isinstance(weight, Tensor):
        return Product(linear if weight.dim() == 2 else _dense_experts, (held[""],))
    return Product(weight.operator, weight.arguments(held))


def _product_of_both(layer: nn.Module, both: Beside, name: str) -> Product:
    layer.register_buffer(f"{name}_place", both.place, persistent=False)
    return Product(linear_beside, (_Held(f"{name}_place"), both.packed.rows), both)


def run(layer: Any, products: Sequence[Product], x: Tensor, bias: Tensor | None) -> Tensor:
    if len(products) == 1:
        return products[0](layer, x, bias)
    y = torch.cat([product(layer, x, None) for product in products], dim=-1)
    return y if bias is None else y + bias


def joined(matrices: Sequence[Packed | Tensor]) -> Packed | Tensor:
    packed = [m for m in matrices if isinstance(m, Packed)]
    return concatenate(packed) if packed else torch.cat([m for m in matrices if isinstance(m, Tensor)])


def settled(name: str, matrix: Packed | Tensor, how: OnDevice) -> PackedWeight | PreparedWeight | Tensor:
    """A matrix on the device, in its layouts; dense, with a note, where a GPU has no kernel for it."""
    if isinstance(matrix, Tensor):
        return matrix.to(how.device)
    if how.device.type != "cuda" and how.target is None:
        return PackedWeight.holding(matrix, exact=how.exact)
    if matrix.bits is not None and matrix.layout == "packed24":
        # Kernels for integers take few tokens, and a server has many: those of 16 bits take any number.
        matrix = pack(unpack(matrix), "packed24")
    scales = None if matrix.scales is None else matrix.scales.to(how.device)
    there = replace(matrix, values=matrix.values.to(how.device), codes=matrix.codes.to(how.device), scales=scales)
    weight = prepare_weight(there, how.policy, tune=how.tune, target=how.target)
    if not isinstance(weight, Refused):
        return weight
    if weight.code == NO_COMPILER:
        # Triton's kernels take the portable layout meanwhile.
        logger.warning_once("sparsify: %s (pip install nvidia-cuda-nvrtc); products are slower", weight.reason)
        return PackedWeight.holding(there)
    logger.warning("sparsify: %s is kept dense on the GPU: %s", name, weight.reason)
    return unpack(there)


def _kind(matrix: Packed | Tensor) -> tuple[Any, ...]:
    return () if isinstance(matrix, Tensor) else (matrix.layout, matrix.bits, matrix.group)


def _dense_experts(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    from transformers.integrations.moe import _grouped_mm

    y: Tensor = _grouped_mm(x, weight.transpose(-2, -1), offs=offsets.int())
    return y
