"""Linear layers over packed weights, in the portable layout or in that of the GPU they lie on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.packed.format import CODES, PackedSite, pack_parameter
from sparsify.backends.packed.loaded.product import Member, Product
from sparsify.errors import BackendError
from sparsify.runtime.arguments import wants_gradient
from sparsify.runtime.cpu.unpacking import unpacked
from sparsify.runtime.layout import Packed
from sparsify.runtime.ops import linear_24, linear_bitmask
from sparsify.runtime.packed_weight import operator_numbers, operator_of


def hold(module: nn.Module, name: str, site: PackedSite, dtype: torch.dtype, device: torch.device) -> None:
    """Give ``module`` the tensors of a packed parameter: values, or scales of integers, under its name, the rest
    beside it.
    """
    for part, (shape, kind) in site.parts.items():
        if not part:
            values = torch.empty(shape, dtype=dtype, device=device)
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
        else:
            module.register_buffer(name + part, torch.zeros(shape, dtype=kind, device=device))
    if site.layout == "bitmask":
        # Counted from the mask when that is there: no file holds it.
        starts = torch.zeros(site.height + 1, dtype=torch.int64, device=device)
        module.register_buffer(f"{name}_starts", starts, persistent=False)


def leaves_graph(x: Tensor) -> bool:
    """Whether a product with ``x`` has to stay out of the graph that torch compiles just now, to be run and not to be
    exported: compilers know no gradient of the operators, and one is asked for.
    """
    return wants_gradient(x) and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def product_of(module: nn.Module, name: str, site: PackedSite, *, exact: bool) -> tuple[Any, ...]:
    """What the operator of a packed parameter takes between ``x`` and what follows its weights."""
    values = () if site.bits is None else (getattr(module, f"{name}_integers"),)
    codes = () if site.layout == "dense" else (getattr(module, f"{name}_{CODES[site.layout]}"),)
    starts = (getattr(module, f"{name}_starts"),) if site.layout == "bitmask" else ()
    return getattr(module, name), *values, *codes, *starts, *operator_numbers(site.bits, site.group, exact)


class PackedLinear(Member):
    """A linear layer over a packed weight.

    ``weight`` holds the packed values, or the scales of integers, in the model's dtype: code that asks a layer's weight
    for its dtype or device is answered; code that multiplies with it itself fails by its shape. Moved to a GPU, a 2:4
    layer changes to that GPU's layouts, and back when it is moved away, converted to another dtype or given other
    weights; files always hold the portable layout.
    """

    weight_mask: Tensor
    weight_starts: Tensor

    def __init__(
        self,
        site: PackedSite,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool = False,
    ) -> None:
        """Args:
        exact: inputs of integers are not rounded to 8 bits.
        """
        super().__init__()
        self.site, self.in_features, self.out_features = site, site.columns, site.rows
        self.exact = exact
        hold(self, "weight", site, dtype, device)
        self.register_parameter("bias", bias)
        self.product = Product([self])

    def forward(self, x: Tensor) -> Tensor:
        if leaves_graph(x):
            return self._outside(x)
        return self._multiply(x)

    @torch.compiler.disable
    def _outside(self, x: Tensor) -> Tensor:
        """The product outside of a compiled graph."""
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.product.plan is not None:
            return self.product.part(self, x)
        if self.site.bits is not None:
            run = operator_of(self.site.layout, few=True, stacked=False)
            return run(x, *product_of(self, "weight", self.site, exact=self.exact), self.bias)
        if self.site.layout == "packed24":
            return linear_24(x, self.weight, self.weight_meta, self.bias)
        return linear_bitmask(x, self.weight, self.weight_mask, self.weight_starts, self.bias)

    def packed(self) -> Packed:
        """The packed matrix, in the portable layout."""
        if self.product.plan is not None:
            return self.product.portable(self)
        return self.site.packed(lambda part: getattr(self, f"weight{part}").detach())

    def widen(self) -> None:
        """Hold the numbers of a 2:4 weight in their own dtype, as integers no more."""
        self.product.release()
        packed = self.packed()
        site, tensors = pack_parameter(unpacked(packed), "packed24", experts=None, transposed=self.site.transposed)
        for part in self.site.parts:
            delattr(self, f"weight{part}")
        hold(self, "weight", site, packed.dtype, packed.values.device)
        for part, tensor in tensors.items():
            getattr(self, f"weight{part}").data = tensor
        self.site = site

    def extra_repr(self) -> str:
        layout = self.site.label if self.product.plan is None else f"{self.site.label} on a GPU ({self.product.plan})"
        return f"in_features={self.in_features}, out_features={self.out_features}, layout={layout}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        probe = fn(self.weight.new_empty(0))
        if probe.dtype == torch.float64:
            # transformers refuses half() and float() of what is quantized, and not this.
            raise BackendError(
                "packed weights in float64",
                found="no kernel for it: float32, bfloat16 and float16 are what there are",
                do="Load the model again and call dequantize() before: it makes the weights dense, in place",
            )
        if self.product.plan is not None and (probe.device, probe.dtype) != (self.weight.device, self.weight.dtype):
            self.product.release()
        super()._apply(fn, recurse)
        self.product.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.product.plan is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for part, tensor in self.site.tensors(self.packed()).items():
            destination[f"{prefix}weight{part}"] = tensor
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.product.release()
        super()._load_from_state_dict(*args, **kwargs)
        self.product.settle()
