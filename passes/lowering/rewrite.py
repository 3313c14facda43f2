"""Replace contractions of an FX graph by operators over packed weights, which the module then holds as buffers."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsify.analysis.contraction import Contraction
from sparsify.ir.graph import set_tensor
from sparsify.ir.operators import exact_name
from sparsify.passes.lowering.unread import drop_unread
from sparsify.runtime import ops

T = TypeVar("T")

aten = torch.ops.aten
PLACE = "sparsify_packed"


class Weight(Protocol):
    """What takes the place of a dense weight: :class:`PackedWeight`, or one prepared for a GPU.

    Attributes:
        operator: called with x, then with what :meth:`arguments` gives, then with a bias or with offsets.
    """

    @property
    def operator(self) -> OpOverload[..., Tensor]: ...

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    def arguments(self, held: Mapping[str, T]) -> tuple[T | int | str | None, ...]: ...


class Rewriter:
    """Edits ``module``'s graph in place; call :meth:`finish` last.

    Args:
        values: nodes whose value is known and constant, such as parameters that ``torch.compile`` lifted.
    """

    def __init__(self, module: fx.GraphModule, values: Mapping[fx.Node, Tensor]) -> None:
        self.module, self.graph, self.values = module, module.graph, values
        self.modified = False
        # What the module holds already, by its identity, with where; kept here, so that no other gets that identity.
        self._stored: dict[int, tuple[Weight, list[str]]] = {}
        self._dense = 0
        # A contraction may read another one that has been replaced already.
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._order = {node: i for i, node in enumerate(self.graph.nodes)}

    def pack(self, c: Contraction, weight: Weight) -> None:
        """Let ``c`` multiply with ``weight``."""
        with self.graph.inserting_before(c.node):
            args = (self._now(c.x), *weight.arguments(self._held(weight, c.name)))
            if c.offsets is not None:
                self._replace(c, self.graph.call_function(weight.operator, (*args, self._now(c.offsets))))
                return
            self._replace(c, self._with_bias(c, weight.operator, args))

    def merge(self, group: Sequence[Contraction], joined: Weight) -> None:
        """Let one product with ``joined`` serve all of ``group``, which read one input and have known biases."""
        first = min((c.node for c in group), key=self._order.__getitem__)
        with self.graph.inserting_before(first):
            args = (self._now(group[0].x), *joined.arguments(self._held(joined, group[0].name)))
            y = self.graph.call_function(joined.operator, (*args, self._joined_bias(group)))
            sizes = [c.weight.shape[0] for c in group]
            # Copies, so that each is contiguous as the sibling's own output was; of one token they are small.
            parts = self.graph.call_function(aten.split_with_sizes_copy.default, (y, sizes, -1))
            items = [self.graph.call_function(operator.getitem, (parts, i)) for i in range(len(group))]
        for c, item in zip(group, items, strict=True):
            self._replace(c, item)

    def dense(self, c: Contraction) -> None:
        """Let ``c`` stay dense and run our kernel where it has one token."""
        with self.graph.inserting_before(c.node):
            name = f"{PLACE}.dense_{len(self._stored) + self._dense}"
            self._dense += 1
            # A view of the graph's own tensor: nothing is copied.
            set_tensor(self.module, name, c.weight)
            self._replace(c, self._with_bias(c, ops.linear_dense, [self._now(c.x), self.graph.get_attr(name)]))

    def known_bias(self, c: Contraction) -> Tensor | None:
        """The bias of ``c`` where it is known and one number per output neuron; None also where it has none."""
        value = c.bias if isinstance(c.bias, Tensor) else None
        if isinstance(c.bias, fx.Node):
            value = self.values.get(c.bias)
            if value is None and c.bias.op == "get_attr":
                owner, _, leaf = str(c.bias.target).rpartition(".")
                value = getattr(self.module.get_submodule(owner), leaf).detach()
        fits = value is not None and tuple(value.shape) == (c.weight.shape[0],) and value.dtype == c.weight.dtype
        return value if fits else None

    def written_between(self, group: Sequence[Contraction]) -> bool:
        """Whether the input of ``group`` may be written to in place between its first node and its last."""
        places = [self._order[c.node] for c in group]
        own = {c.node for c in group}
        between = [u for u in group[0].x.users if u not in own and min(places) < self._order[u] < max(places)]
        return any(_may_write(user) for user in between)

    def finish(self) -> bool:
        """Drop what nothing reads any more, and check the graph; whether anything was changed."""
        if self.modified:
            drop_unread(self.module)
            self.graph.lint()
            self.module.recompile()
        return self.modified

    def _with_bias(self, c: Contraction, operator: OpOverload[..., Tensor], args: Sequence[Argument]) -> fx.Node:
        """A call with the bias inside where it is a plain one, else added behind."""
        if c.bias is None:
            return self.graph.call_function(operator, tuple(args))
        bias = c.bias
        if isinstance(bias, Tensor):
            name = f"{PLACE}.bias_{self._order[c.node]}"
            set_tensor(self.module, name, bias)
            bias = self.graph.get_attr(name)
        bias = self._now(bias)
        if not c.added or self.known_bias(c) is not None:
            return self.graph.call_function(operator, (*args, bias))
        return self.graph.call_function(aten.add.Tensor, (self.graph.call_function(operator, tuple(args)), bias))

    def _joined_bias(self, group: Sequence[Contraction]) -> fx.Node | None:
        biases = [self.known_bias(c) for c in group]
        if all(bias is None for bias in biases):
            return None
        parts = [c.weight.new_zeros(c.weight.shape[0]) if b is None else b for b, c in zip(biases, group, strict=True)]
        name = f"{PLACE}.bias_{self._order[group[0].node]}"
        set_tensor(self.module, name, torch.cat(parts))
        return self.graph.get_attr(name)

    def _replace(self, c: Contraction, node: fx.Node) -> None:
        # Shapes and dtypes that other passes look for stay where they were.
        node.meta = dict(c.node.meta)
        c.node.replace_all_uses_with(node)
        self.graph.erase_node(c.node)
        self._replaced[c.node] = node
        self.modified = True

    def _now(self, node: fx.Node) -> fx.Node:
        return self._replaced.get(node, node)

    def _held(self, weight: Weight, name: str) -> dict[str, fx.Node]:
        """Hold the tensors of ``weight`` in the module, once; a node that reads each."""
        tensors = weight.tensors
        if id(weight) not in self._stored:
            safe = "".join(ch if ch.isalnum() else "_" for ch in name)
            place = f"{PLACE}.{safe}_{len(self._stored) + self._dense}"
            for part, tensor in tensors.items():
                set_tensor(self.module, f"{place}.{part}", tensor)
            self._stored[id(weight)] = (weight, [f"{place}.{part}" for part in tensors])
        _, places = self._stored[id(weight)]
        return {part: self.graph.get_attr(place) for part, place in zip(tensors, places, strict=True)}


def _may_write(node: fx.Node) -> bool:
    if node.op == "call_module":
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = exact_name(node)
    in_place = (
        node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator" and name.startswith("i")
    )
    return (name.endswith("_") and not name.endswith("__")) or in_place or name == "setitem"
