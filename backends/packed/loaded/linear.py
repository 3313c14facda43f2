"""Linear layers over packed weights, in the portable layout or in that of the GPU they lie on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.packed.format import CODES, PackedSite
from sparsify.errors import Refused
from sparsify.runtime.cuda.dispatch import Plan, Timings
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.cuda.ops import linear_24_prepared
from sparsify.runtime.cuda.prepared import PreparedWeight, prepare
from sparsify.runtime.layout import Packed, concatenate
from sparsify.runtime.ops import linear_24, linear_bitmask
from sparsify.runtime.words import Policy

# The type of the devices whose layouts are taken.
GPU_TYPE = "cuda"


def hold(module: nn.Module, name: str, site: PackedSite, dtype: torch.dtype, device: torch.device) -> None:
    """Give ``module`` the tensors of a packed parameter: values under its name, codes beside it."""
    values = torch.empty(site.values_shape, dtype=dtype, device=device)
    module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    codes = torch.zeros(site.codes_shape, dtype=site.codes_dtype, device=device)
    module.register_buffer(f"{name}_{CODES[site.layout]}", codes)
    if site.layout == "bitmask":
        # Counted from the mask when that is there: no file holds it.
        starts = torch.zeros(site.height + 1, dtype=torch.int64, device=device)
        module.register_buffer(f"{name}_starts", starts, persistent=False)


class PackedLinear(nn.Module):
    """A linear layer over a packed weight.

    ``weight`` holds the packed values, in the model's dtype: code that asks a layer's weight for its dtype or device is
    answered; code that multiplies with it itself fails by its shape. Moved to a GPU, a 2:4 layer changes to that GPU's
    layouts, and back when it is moved away, converted to another dtype or given other weights; files always hold the
    portable layout.
    """

    weight: nn.Parameter
    weight_meta: Tensor
    weight_mask: Tensor
    weight_starts: Tensor
    bias: nn.Parameter | None
    # Of the first of the layers that share a product on a GPU.
    weight_compressed: Tensor | None
    weight_codes: Tensor | None
    joined_bias: Tensor | None
    site: PackedSite
    product: Product

    def __init__(self, site: PackedSite, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.site, self.in_features, self.out_features = site, site.columns, site.rows
        hold(self, "weight", site, dtype, device)
        self.register_parameter("bias", bias)
        self.product = Product([self])

    def forward(self, x: Tensor) -> Tensor:
        if self.product.plan is not None:
            return self.product.part(self, x)
        if self.site.layout == "packed24":
            return linear_24(x, self.weight, self.weight_meta, self.bias)
        return linear_bitmask(x, self.weight, self.weight_mask, self.weight_starts, self.bias)

    def packed(self) -> Packed:
        """The packed matrix, in the portable layout."""
        if self.product.plan is not None:
            return self.product.portable(self)
        codes: Tensor = getattr(self, f"weight_{CODES[self.site.layout]}")
        return self.site.packed(self.weight.data, codes)

    def extra_repr(self) -> str:
        layout = self.site.layout if self.product.plan is None else f"{self.site.layout} on a GPU ({self.product.plan})"
        return f"in_features={self.in_features}, out_features={self.out_features}, layout={layout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        if self.product.plan is not None:
            probe = fn(self.weight.new_empty(0))
            if probe.device != self.weight.device or probe.dtype != self.weight.dtype:
                self.product.release()
        super()._apply(fn, recurse)
        self.product.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.product.plan is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        packed = self.packed()
        destination[f"{prefix}weight"], destination[f"{prefix}weight_meta"] = packed.values, packed.codes
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.product.release()
        super()._load_from_state_dict(*args, **kwargs)
        self.product.settle()


class Product:
    """What one layer, or several that read one input (q/k/v, gate/up), multiply with on a GPU: one matrix for all.

    The first of several, in the order in which the model runs them, does the whole product and holds the matrix; the
    others take their parts of it as long as they are asked with that same input, and else do it again.

    Attributes:
        plan: of the matrix (:class:`sparsify.runtime.cuda.dispatch.Plan`, as text); None while the layers hold portable
            weights.
        refused: why the matrix stays as it is, once that was tried.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
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

    def part(self, member: PackedLinear, x: Tensor) -> Tensor:
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

    def prepare(self) -> None:
        """Take the layouts of the GPU (``target``, or the one that the members lie on), or note the reason why not."""
        self.release()
        leader = self.members[0]
        if leader.site.layout != "packed24":
            self.refused = Refused("not 2:4, the only sparsity that GPUs multiply")
            return
        packed = [m.packed() for m in self.members]
        weight = prepare(
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
            del member.weight_meta
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
            member.weight = nn.Parameter(packed.values, requires_grad=False)
            member.register_buffer("weight_meta", packed.codes)
        leader = self.members[0]
        for name in ("weight_compressed", "weight_codes", "joined_bias"):
            leader._buffers.pop(name, None)

    def portable(self, member: PackedLinear) -> Packed:
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
        rows = zip(whole.values.split(self.sizes), whole.codes.split(self.sizes), self.sizes, strict=True)
        return [Packed("packed24", (size, leader.in_features), v.clone(), c.clone()) for v, c, size in rows]
