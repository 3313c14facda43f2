"""What packed linear layers multiply with on a GPU: one matrix for a layer, or for several that read one input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsify.backends.packed.format import PackedSite
from sparsify.errors import Refused
from sparsify.runtime.cuda.dispatch import Plan, Timings
from sparsify.runtime.cuda.gpu import FEW_BITS, GPU, NOT_24
from sparsify.runtime.cuda.ops import linear_24_prepared
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare_weight
from sparsify.runtime.layout import Packed, concatenate
from sparsify.runtime.words import Policy

# The type of the devices whose layouts are taken.
GPU_TYPE = "cuda"


def lies_on_gpu(weight: Tensor) -> bool:
    return weight.device.type == GPU_TYPE


class Member(nn.Module):
    """A layer that has its part in a product."""

    site: PackedSite
    in_features: int
    out_features: int
    product: Product
    weight: nn.Parameter
    weight_meta: Tensor
    bias: nn.Parameter | None
    # Of the first of the layers that share a product on a GPU.
    weight_compressed: Tensor | None
    weight_codes: Tensor | None
    joined_bias: Tensor | None

    def packed(self) -> Packed:
        """The packed matrix, in the portable layout."""
        raise NotImplementedError


class Product:
    """What one layer, or several that read one input (q/k/v, gate/up), multiply with on a GPU: one matrix for all.

    The first of several, in the order in which the model runs them, does the whole product and holds the matrix; the
    others take their parts of it as long as they are asked with that same input, and else do it again.

    Attributes:
        plan: of the matrix (:class:`sparsify.runtime.cuda.dispatch.Plan`, as text); None while the layers hold portable
            weights.
        refused: why the matrix stays as it is, once that was tried.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.sizes = [member.out_features for member in self.members]
        self.policy: Policy = "decode"
        self.tune = True
        self.target: GPU | None = None
        self.plan: str | None = None
        self.refused: Refused | None = None
        self.timings = Timings({})
        self._fragments = True
        # The input that was multiplied last, and the parts of its product.
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def alone(self, member: Member) -> Product:
        """What ``member`` multiplies with where it shares its product no longer."""
        own = Product([member])
        own.policy, own.tune = self.policy, self.tune
        return own

    def part(self, member: Member, x: Tensor) -> Tensor:
        """``member``'s product with ``x``."""
        if len(self.members) == 1:
            return self._whole(x)
        place = next(i for i, other in enumerate(self.members) if other is member)
        last = self._last
        parts = last[1] if last is not None and last[0] is x and place else self._whole(x).split(self.sizes, -1)
        self._last = None if place == len(self.members) - 1 else (x, parts)
        return parts[place]

    def _whole(self, x: Tensor) -> Tensor:
        leader = self.members[0]
        main, more, codes = leader.weight, leader.weight_compressed, leader.weight_codes
        fragments, compressed = (main, more) if self._fragments else (None, main)
        bias = leader.bias if len(self.members) == 1 else leader.joined_bias
        return linear_24_prepared(x, fragments, compressed, codes, sum(self.sizes), self.plan, bias)

    def settle(self) -> None:
        """Take the layouts of the GPU, where all members lie on one and wait for it."""
        places = {(m.weight.device, m.weight.dtype) for m in self.members}
        if self.plan is None and len(places) == 1 and next(iter(places))[0].type == GPU_TYPE:
            self.prepare()
            if self.members[0].site.bits is not None and self.refused is not None:
                text = f"sparsify: {self.refused.reason}: every product unpacks its weight. prepare(model), of "
                text += "sparsify.backends.packed.loaded, finds them a layout that does not"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def prepare(self) -> None:
        """Take the layouts of the GPU (``target``, or the one that the members lie on), or note the reason why not."""
        self.release()
        leader = self.members[0]
        if leader.site.layout != "packed24":
            self.refused = Refused(NOT_24 if leader.site.bits is None else FEW_BITS)
            return
        packed = [m.packed() for m in self.members]
        weight = prepare_weight(
            packed[0] if len(packed) == 1 else concatenate(packed), self.policy, tune=self.tune, target=self.target
        )
        if isinstance(weight, Refused):
            self.refused = weight
            return
        self._take(weight)

    def _take(self, weight: PreparedWeight) -> None:
        leader = self.members[0]
        self.plan, self.timings, self.refused = str(weight.plan), weight.timings, None
        self._fragments = weight.fragments is not None
        main = weight.compressed if weight.fragments is None else weight.fragments.view(weight.dtype)
        assert main is not None, "a prepared weight has one copy at least"
        for member in self.members:
            values = main if member is leader else member.weight.new_empty(0)
            member.weight = nn.Parameter(values, requires_grad=False)
            for part in filter(None, member.site.parts):
                delattr(member, f"weight{part}")
        leader.register_buffer("weight_compressed", weight.compressed if self._fragments else None, persistent=False)
        leader.register_buffer("weight_codes", weight.codes, persistent=False)
        if len(self.members) > 1:
            biases = [m.bias for m in self.members]
            parts = [
                main.new_zeros(m.out_features) if b is None else b.detach()
                for m, b in zip(self.members, biases, strict=True)
            ]
            known = any(b is not None for b in biases)
            leader.register_buffer("joined_bias", torch.cat(parts) if known else None, persistent=False)

    def release(self) -> None:
        """Give every member its portable weight back."""
        self._last = self.refused = None
        if self.plan is None:
            return
        parts = self._portable()
        self.plan, self.timings = None, Timings({})
        for member, packed in zip(self.members, parts, strict=True):
            for part, tensor in member.site.tensors(packed).items():
                if part:
                    member.register_buffer(f"weight{part}", tensor)
                else:
                    member.weight = nn.Parameter(tensor, requires_grad=False)
        leader = self.members[0]
        for name in ("weight_compressed", "weight_codes", "joined_bias"):
            leader._buffers.pop(name, None)

    def portable(self, member: Member) -> Packed:
        return self._portable()[self.members.index(member)]

    def _portable(self) -> list[Packed]:
        """Every member's weight in the portable layout."""
        leader = self.members[0]
        main = leader.weight.data
        fragments, compressed = (main, leader.weight_compressed) if self._fragments else (None, main)
        whole = PreparedWeight(
            sum(self.sizes),
            leader.in_features,
            main.dtype,
            fragments,
            compressed,
            leader.weight_codes,
            Plan.parse(self.plan or ""),
            self.timings,
        ).portable()
        values, codes = whole.values.split(self.sizes), whole.codes.split(self.sizes)
        scales = (
            [None] * len(self.sizes) if whole.scales is None else [s.clone() for s in whole.scales.split(self.sizes)]
        )
        rows = zip(self.sizes, values, codes, scales, strict=True)
        return [
            replace(whole, shape=(n, leader.in_features), values=v.clone(), codes=c.clone(), scales=s)
            for n, v, c, s in rows
        ]
