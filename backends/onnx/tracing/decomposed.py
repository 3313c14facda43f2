"""What torch's exporter knows none of ONNX for, decomposed node by node.

The exporter has an exported program run once more, whole, under three tracers, so that some of its operators come apart
into those that it knows: half of what an export takes, for a tenth of the nodes. Where nothing writes in place, an
operator comes apart by itself, and as the same operator of the same shapes in another layer did.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

Table = dict[Any, Callable[..., object]]

# What says something of a value, and changes none.
_IDENTITIES = (aten.detach_.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default)
_CHECKS = (aten._assert_tensor_metadata.default,)
# Sizes that the exporter knows no operator for; torch's whole way says most of them in others.
_SIZES = (aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default)
# A view where strides allow it: of memory ONNX knows nothing, and it has an operator for both.
_KEPT = (aten.reshape.default,)


def decompose_apart(exported: torch.export.ExportedProgram) -> None:
    """Have ``exported`` decompose in place when the exporter asks it to, where that is the same: where it holds
    operators of tensors alone, and none writes what another name shares."""
    whole = exported.run_decompositions

    def run_decompositions(table: Table) -> torch.export.ExportedProgram:
        with torch.no_grad():
            if Decomposition(exported, table).run():
                return exported
        return whole(table)

    # The exporter takes an exported program as it is, and asks that one.
    vars(exported)["run_decompositions"] = run_decompositions


@dataclass
class Decomposition:
    """``exported``, and by what its operators come apart; ``known``: what each came apart into."""

    exported: torch.export.ExportedProgram
    table: Table
    known: dict[object, fx.Graph | None] = field(default_factory=dict)

    def run(self) -> bool:
        """Decompose; False, and the graph computes what it did, where nodes cannot be taken one by one."""
        graph = self.exported.graph
        signature = self.exported.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            return False
        for node in list(graph.nodes):
            if _writes(node):
                _write_anew(node)
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        if not all(_is_plain(node) for node in nodes) or any(node.op == "get_attr" for node in graph.nodes):
            return False
        for node in nodes:
            if node.target in _CHECKS:
                graph.erase_node(node)
            elif node.target in _IDENTITIES or _keeps_shape(node):
                self._replace(node, node.args[0])
            elif self._comes_apart(node):
                into = self._apart(node)
                if into is None:
                    return False
                self._splice(node, into)
        graph.eliminate_dead_code()
        self.exported.graph_module.recompile()
        return True

    def _comes_apart(self, node: fx.Node) -> bool:
        target = node.target
        if not isinstance(target, OpOverload) or target in (*_IDENTITIES, *_CHECKS, *_KEPT):
            return False
        return target in self.table or (_is_implicit(target) and _may_alias(target))

    def _apart(self, node: fx.Node) -> fx.Graph | None:
        """The graph of what ``node`` comes apart into, of its tensors and sizes; None where it does not alone."""
        given = [each.meta["val"] for each in node.all_input_nodes]
        key = (node.target, _structure(node), tuple(map(_described, given)))
        if key not in self.known:
            self.known[key] = self._trace(node, given)
        return self.known[key]

    def _trace(self, node: fx.Node, given: list[Any]) -> fx.Graph | None:
        inputs = node.all_input_nodes

        def alone(*values: Any) -> Any:
            by_node = dict(zip(inputs, values, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), by_node.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        try:
            with enable_python_dispatcher():
                traced = make_fx(alone, decomposition_table=self.table, _allow_non_fake_inputs=True)(*given)
        except Exception:  # many kinds, of every operator's own; the exporter's way, tried next, says what it is
            return None
        traced.graph.eliminate_dead_code()
        plain = all(
            each.op in ("placeholder", "call_function", "output") and _is_plain(each) for each in traced.graph.nodes
        )
        return traced.graph if plain else None

    def _splice(self, node: fx.Node, into: fx.Graph) -> None:
        places = [each for each in into.nodes if each.op == "placeholder"]
        values: dict[fx.Node, Any] = dict(zip(places, node.all_input_nodes, strict=True))
        with self.exported.graph.inserting_before(node):
            for each in into.nodes:
                if each.op == "call_function":
                    new = self.exported.graph.node_copy(each, values.__getitem__)
                    new.meta = {**node.meta, "val": each.meta.get("val")}
                    values[each] = new
        (made,) = next(each for each in into.nodes if each.op == "output").args
        self._replace(node, fx.map_arg(made, values.__getitem__))

    def _replace(self, node: fx.Node, made: Any) -> None:
        if isinstance(made, fx.Node):
            self.exported.graph_signature.replace_all_uses(node.name, made.name)
            node.replace_all_uses_with(made)
        else:
            for user in list(node.users):
                self._replace(user, made[user.args[1]])
        self.exported.graph.erase_node(node)


def _is_plain(node: fx.Node) -> bool:
    """Whether ``node`` computes from its inputs alone, leaves these as they are, and is no size unknown to ONNX."""
    return not _writes(node) and not isinstance(node.target, HigherOrderOperator) and node.target not in _SIZES


def _keeps_shape(node: fx.Node) -> bool:
    """Whether ``node`` gives its input the shape that it has."""
    if node.target not in (*_KEPT, aten.view.default):
        return False
    given, made = (each.meta["val"].shape for each in (node.args[0], node))  # type: ignore[union-attr]
    return tuple(map(_described, given)) == tuple(map(_described, made))


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable and target not in _IDENTITIES


def _write_anew(node: fx.Node) -> None:
    """Make of an operator that writes its first argument (``add_``) the one that does not, where no other name for that
    memory is read afterwards."""
    target, written = node.target, node.args[0] if node.args else None
    assert isinstance(target, OpOverload)
    packet, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    twin = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    if not packet.endswith("_") or twin is None or not (isinstance(written, fx.Node) and written.op == "call_function"):
        return
    others = _sharing(written, node) - {written}
    if any(each.op != "call_function" or any(user > node for user in each.users) for each in others):
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    made, value = twin(*args, **kwargs), node.meta["val"]
    if _described(made) != _described(value):
        return
    node.target = twin
    written.replace_all_uses_with(node, lambda user: user > node)


def _sharing(node: fx.Node, until: fx.Node) -> set[fx.Node]:
    """``node`` and all before ``until`` that may lie in its memory."""
    found, left = set[fx.Node](), [node]
    while left:
        each = left.pop()
        if each in found:
            continue
        found.add(each)
        left += [user for user in each.users if user < until and _may_share(user)]
        left += each.all_input_nodes if _may_share(each) else []
    return found


def _may_share(node: fx.Node) -> bool:
    """Whether what ``node`` gives may lie in the memory of what it is given."""
    if node.target is operator.getitem:
        return _may_share(node.args[0])  # type: ignore[arg-type]
    if node.op == "placeholder" or not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
        return False
    # An implicit one may give what it was given, whatever it says of itself (dropout where nothing is dropped).
    return not isinstance(node.target, OpOverload) or _may_alias(node.target) or _is_implicit(node.target)


def _is_implicit(target: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


def _may_alias(target: OpOverload) -> bool:
    """Whether what it returns may be its input: torch keeps none such, and the exporter knows few."""
    aliases = any(argument.alias_info is not None for argument in target._schema.arguments)
    return aliases or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _structure(node: fx.Node) -> str:
    """The arguments of ``node``, its inputs by their places."""
    places = {each: place for place, each in enumerate(node.all_input_nodes)}
    return repr(fx.map_arg((node.args, node.kwargs), lambda each: f"%{places[each]}"))


def _described(value: Any) -> object:
    """All of a tensor or a size that decides how an operator comes apart."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, *map(_described, (*value.shape, *value.stride()))
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value
