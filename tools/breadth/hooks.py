"""Wanda by plain eager hooks: squared norms of what each weight multiplies, seen by nothing of sparsify."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
_ADDED = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}

# A weight and, where it is one of a stack, its number.
Key = tuple[str, int]


class InputNorms(TorchFunctionMode):
    """While it is entered: the sum of squares of every input feature of every product with a parameter of ``model``.

    Seen are ``torch.nn.functional.linear`` (``nn.Linear``, experts that lie stacked), ``addmm`` (GPT-2's Conv1D) and
    products of matrices (Falcon, Llama 4). ``transposed``: parameters that lie [in, out]. ``calls``: what each product
    added to ``squares``, in order. ``disturbed``: a product, by its number among ``calls``, that gives something else.
    """

    def __init__(self, model: nn.Module, disturbed: tuple[Key, int] | None = None) -> None:
        super().__init__()
        self.squares: dict[Key, Tensor] = {}
        self.calls: dict[Key, list[Tensor]] = {}
        self.disturbed = disturbed
        self.transposed: set[str] = set()
        self._names = {p.untyped_storage().data_ptr(): (n, p) for n, p in model.named_parameters()}
        # Another name of a tied weight is the first one's.
        self.canonical = {
            n: self._names[p.untyped_storage().data_ptr()][0] for n, p in model.named_parameters(remove_duplicate=False)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._asked()
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight.dim() > 1:
                self._see(args[0] if args else kwargs["input"], weight.transpose(-1, -2))
        elif func in _PRODUCTS and len(args) > 1 and all(isinstance(a, Tensor) for a in args[:2]):
            self._see(args[0], args[1])
        elif func in _ADDED and len(args) > 2:
            self._see(args[1], args[2])
        found = func(*args, **kwargs)
        asked = self.disturbed is not None and before == self.disturbed[1] < self._asked()
        # Not by the same everywhere: a norm, or a softmax, would take that away again.
        return found + torch.arange(found.numel()).sin().reshape(found.shape) if asked else found

    def _asked(self) -> int:
        return 0 if self.disturbed is None else len(self.calls.get(self.disturbed[0], ()))

    def _see(self, x: Tensor, right: Tensor) -> None:
        """``x`` [..., in] is multiplied with ``right`` [in, out], or [experts, in, out]."""
        name, parameter = self._names.get(right.untyped_storage().data_ptr(), ("", None))
        if parameter is None or right.dim() < 2:
            return
        for view, transposed in ((right.transpose(-1, -2), False), (right, True)):
            if view.shape == parameter.shape and view.stride() == parameter.stride():
                stack = x.unbind(0) if view.dim() == 3 and x.dim() == 3 else (x,)
                first = 0
            elif parameter.dim() == 3 and view.shape == parameter.shape[1:] and view.stride() == parameter.stride()[1:]:
                stack, first = (x,), (view.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            else:
                continue
            if transposed:
                self.transposed.add(name)
            for number, rows in enumerate(stack, first):
                squares = rows.detach().reshape(-1, rows.shape[-1]).double().square().sum(0)
                before = self.squares.get((name, number))
                # Multiplied from both sides: then the first one counts, and no mask is compared with it in vain.
                if before is None or before.shape == squares.shape:
                    self.squares[name, number] = squares if before is None else before + squares
                    self.calls.setdefault((name, number), []).append(squares)
            return


def expected_mask(weight: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """What 2:4 Wanda prunes of ``weight`` [out, in], and which groups of four are too close to call."""
    scores = (weight.double().abs() * squares.sqrt()).reshape(weight.shape[0], -1, 4)
    ordered = scores.sort(dim=-1, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ordered.indices[..., :2], True)
    close = (ordered.values[..., 2] - ordered.values[..., 1]) <= 1e-5 * ordered.values[..., 2]
    return mask.reshape(weight.shape), close
