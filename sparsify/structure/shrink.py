"""Take channels out of a program: parameters cut, and every size, cut and count in its graph corrected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify.analysis.dimensions.groups import Dimensions
from sparsify.analysis.dimensions.walk import Ids
from sparsify.errors import SpecError, TraceError, first_line
from sparsify.ir.graph import as_meta_tree, empty_root
from sparsify.ir.operators import argument, operator_name
from sparsify.ir.program import Program
from sparsify.ir.store import MemoryStore, TensorStore
from sparsify.ir.weights import Weights


class CutStore:
    """Parameters with positions taken out, cut when they are read."""

    def __init__(self, weights: Weights, kept: Mapping[str, Mapping[int, Ids]]) -> None:
        self.weights, self.positions = weights, kept

    def names(self) -> Iterable[str]:
        return self.weights.parameters()

    def shape(self, name: str) -> torch.Size:
        shape = list(self.weights.shape(name))
        for axis, positions in self.positions.get(name, {}).items():
            shape[axis] = len(positions)
        return torch.Size(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights.dtype(name)

    def read(self, name: str) -> Tensor:
        value = self.weights.read(name)
        for axis, positions in self.positions.get(name, {}).items():
            value = value.index_select(axis, torch.from_numpy(positions).to(value.device))
        return value

    def write(self, name: str, tensor: Tensor) -> None:
        raise SpecError(f"writing {name}", found="weights that are only read", do="Write to an output")


def shrink(program: Program, dimensions: Dimensions, remove: Mapping[int, Sequence[int]]) -> Program:
    """``program`` without the channels ``remove``: of group number g (of ``dimensions.groups``) the channels remove[g].

    Raises:
        SpecError: a group or a channel that there is not, a pinned one, or all of a group.
        TraceError: an operator whose sizes cannot be corrected.
    """
    gone, kept = _gone(dimensions, remove), kept_positions(dimensions, remove)
    edit = _Edit(program, dimensions, gone)
    graph = edit.graph()
    names = {name: name for name in program.weights.parameters()}
    store: TensorStore = MemoryStore(CutStore(program.weights, kept))
    weights = Weights(store, names, aliases=program.weights.aliases)
    shapes = {
        str(n.target): _cut(n.meta["val"], kept.get(program.weights.canonical(str(n.target)), {}))
        for n in graph.nodes
        if n.op == "get_attr" and str(n.target) not in edit.constants
    }
    module = fx.GraphModule(empty_root(shapes | edit.constants), graph)
    result = Program(
        module, weights, edit.constants, program.output_names, program.model, program.literals, program.ways
    )
    _propagate(result, shapes, edit.touched)
    result.verify()
    return result


def kept_positions(dimensions: Dimensions, remove: Mapping[int, Sequence[int]]) -> dict[str, dict[int, Ids]]:
    """Parameter -> axis -> the positions that stay, of every parameter that loses any."""
    gone = _gone(dimensions, remove)
    kept = {
        name: {axis: numpy.flatnonzero(~gone[ids]) for axis, ids in axes.items() if gone[ids].any()}
        for name, axes in _axes(dimensions).items()
    }
    return {name: axes for name, axes in kept.items() if axes}


def _gone(dimensions: Dimensions, remove: Mapping[int, Sequence[int]]) -> Ids:
    """For every class, whether it goes."""
    group_of, channel_of = dimensions.group_of
    gone = numpy.zeros(len(group_of), dtype=bool)
    for number, channels in remove.items():
        if not 0 <= number < len(dimensions.groups):
            raise SpecError(f"group {number}", found=f"{len(dimensions.groups)} groups", do="Name one of them")
        group = dimensions.groups[number]
        wrong = [c for c in channels if not 0 <= c < group.channels or group.pinned[c]]
        if wrong:
            raise SpecError(
                f"removing channel {wrong[0]} of {group.members[0].parameter}",
                found=group.reason or f"{group.channels} channels",
                do="Remove channels that are free",
            )
        if len(set(channels)) == group.channels:
            raise SpecError(
                f"removing all {group.channels} channels of {group.members[0].parameter}",
                found="nothing would be left",
                do="Keep one at least",
            )
        gone |= (group_of == number) & numpy.isin(channel_of, numpy.asarray(list(channels), dtype=int))
    return gone


def _axes(dimensions: Dimensions) -> dict[str, dict[int, Ids]]:
    """The classes of every parameter's dimensions."""
    group_of, channel_of = dimensions.group_of
    found: dict[str, dict[int, Ids]] = {}
    for number, group in enumerate(dimensions.groups):
        own = numpy.flatnonzero(group_of == number)
        by_channel = numpy.empty(group.channels, dtype=int)
        by_channel[channel_of[own]] = own
        for member in group.members:
            found.setdefault(member.parameter, {})[member.axis] = by_channel[member.channel]
    return found


def _cut(val: Tensor, kept: Mapping[int, Ids]) -> Tensor:
    shape = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(val.shape)]
    return torch.empty(shape, dtype=val.dtype, device="meta")


class _Edit:
    """A copy of a graph with its sizes corrected, node by node."""

    def __init__(self, program: Program, dimensions: Dimensions, gone: Ids) -> None:
        self.program, self.rows, self.gone = program, dimensions.rows, gone
        self.constants = dict(program.constants)
        # Nodes of the copy that may give another shape than before.
        self.touched: set[fx.Node] = set()

    def graph(self) -> fx.Graph:
        result, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.program.graph.nodes:
            if node.op == "output":
                result.output(fx.node.map_arg(node.args[0], lambda n: env[n]))
                continue
            env[node] = copied = result.node_copy(node, lambda n: env[n])
            if self._touched(node):
                self.touched.add(copied)
            corrected = _CORRECTIONS.get(operator_name(node)) if node.op == "call_function" else None
            if corrected is not None and copied in self.touched:
                corrected(self, node, copied, result)
        return result

    def _touched(self, node: fx.Node) -> bool:
        return any(self._has_gone(self.rows[n]) for n in (node, *node.all_input_nodes))

    def _has_gone(self, rows: Any) -> bool:
        return any(
            self._has_gone(r) if isinstance(r, list) else r is not None and bool(self.gone[r].any()) for r in rows
        )

    def size(self, row: Ids | None, before: int) -> int:
        """What is left of a dimension of ``before`` positions."""
        return before if row is None else int((~self.gone[row]).sum())

    def left_of(self, row: Ids, position: int) -> int:
        """Where ``position`` of a dimension comes to stand."""
        return int((~self.gone[row[:position]]).sum())

    def shape(self, node: fx.Node) -> list[int]:
        return [self.size(row, n) for row, n in zip(self.rows[node], node.meta["val"].shape, strict=True)]

    def fail(self, node: fx.Node, why: str) -> TraceError:
        return TraceError(f"shrinking {node.name}", found=why, do="Keep these channels, and report the model")


def _set(copied: fx.Node, place: int, name: str, value: Any) -> None:
    if name in copied.kwargs:
        copied.kwargs = {**copied.kwargs, name: value}
        return
    copied.args = (*copied.args[:place], value, *copied.args[place + 1 :])


def _sizes(place: int) -> Callable[[_Edit, fx.Node, fx.Node, fx.Graph], None]:
    """An operator that is told the shape of its value. Sizes that it finds out by itself (-1) stay."""

    def correct(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
        asked: Any = copied.args[place]
        made = edit.shape(node)
        extra = len(made) - len(asked)
        told = [n if isinstance(n, fx.Node) or n == -1 else made[i + extra] for i, n in enumerate(asked)]
        _set(copied, place, "size", told)

    return correct


def _slice(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    dim, step = int(argument(node, 1, "dim", 0)), int(argument(node, 4, "step", 1))
    row = edit.rows[argument(node, 0)][dim]
    if row is None:
        return
    start, end, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(len(row))
    if step == 1:
        _set(copied, 2, "start", edit.left_of(row, start))
        _set(copied, 3, "end", edit.left_of(row, end))
        return
    # Every `step` positions go together or not at all, so that those that are taken still lie where they did.
    whole = len(row) % step == 0 and start < step and end == len(row)
    if not whole or (edit.gone[row].reshape(-1, step).any(1) != edit.gone[row].reshape(-1, step).all(1)).any():
        raise edit.fail(node, f"it takes every {step}th of channels that are not removed in {step}s")


def _select(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    row = edit.rows[argument(node, 0)][int(argument(node, 1))]
    if row is not None:
        _set(copied, 2, "index", edit.left_of(row, int(argument(node, 2)) % len(row)))


def _index(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    """A constant list of positions is another list now."""
    indices = list(argument(node, 1))
    for dim, index in enumerate(indices):
        row = edit.rows[argument(node, 0)][dim]
        if index is None or row is None or str(index.target) not in edit.program.constants:
            continue
        before = edit.program.constants[str(index.target)]
        left = [edit.left_of(row, i % len(row)) for i in before.tolist()]
        after = torch.tensor(left, dtype=before.dtype, device=before.device)
        name = f"{index.target}_{node.name}"
        edit.constants[name] = after
        with graph.inserting_before(copied):
            made = graph.get_attr(name)
        made.meta = {"val": torch.empty(after.shape, dtype=after.dtype, device="meta")}
        told = list(argument(copied, 1))
        told[dim] = made
        _set(copied, 1, "indices", told)


def _pieces(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    """Parts of one size, or of sizes that are told: told they are from here on."""
    dim = int(argument(node, 2, "dim", 0)) % node.meta["val"][0].dim()
    rows = [part[dim] for part in edit.rows[node]]
    sizes = [edit.size(row, val.shape[dim]) for row, val in zip(rows, node.meta["val"], strict=True)]
    copied.target = torch.ops.aten.split_with_sizes.default
    copied.args, copied.kwargs = (copied.args[0], sizes, dim), {}


def _layer_norm(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    depth = len(argument(node, 1))
    _set(copied, 1, "normalized_shape", edit.shape(node)[-depth:])


def _convolution(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    if int(argument(node, 6, "groups", 1)) > 1:
        _set(copied, 6, "groups", edit.shape(node)[1])


def _histc(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    (bins,) = edit.shape(node)
    copied.args, copied.kwargs = (copied.args[0], bins, 0, bins - 1), {}


def _topk(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    dim, many = int(argument(node, 2, "dim", -1)), int(argument(node, 1))
    row = edit.rows[argument(node, 0)][dim]
    if row is not None and edit.size(row, len(row)) < many:
        raise edit.fail(node, f"it chooses {many} of {edit.size(row, len(row))}")


def _repeat(edit: _Edit, node: fx.Node, copied: fx.Node, graph: fx.Graph) -> None:
    # Told for speed alone: it follows from the rest.
    copied.kwargs = {name: value for name, value in copied.kwargs.items() if name != "output_size"}


_CORRECTIONS: dict[str, Callable[[_Edit, fx.Node, fx.Node, fx.Graph], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "new_zeros", "new_ones", "new_empty", "new_full"),
                    _sizes(1)),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _sizes(0)),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _pieces),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "slice": _slice, "select": _select, "index": _index, "histc": _histc, "topk": _topk,
    "repeat_interleave": _repeat,
}  # fmt: skip


def _propagate(program: Program, shapes: Mapping[str, Tensor], touched: Collection[fx.Node]) -> None:
    """Give every node the shape that its value has now; those that nothing smaller reaches keep theirs.

    What comes out as large as before ends a way: behind it may lie operators whose sizes only a run can give.

    Raises:
        TraceError: the graph does not run any more, which would be a rule's mistake.
    """
    values: dict[fx.Node, Any] = {}
    smaller: set[fx.Node] = set()

    def value_of(given: Any) -> Any:
        # Shapes are the same on every device; fake values of two would not go together.
        if isinstance(given, torch.device):
            return torch.device("cpu")
        if isinstance(given, fx.Node) and given not in values:
            values[given] = _empty(given.meta["val"])
        return values[given] if isinstance(given, fx.Node) else given

    with FakeTensorMode():
        for node in program.graph.nodes:
            known = shapes.get(str(node.target)) if node.op == "get_attr" else None
            if known is not None and known.shape != node.meta["val"].shape:
                node.meta["val"] = known
                smaller.add(node)
            if node.op != "call_function" or not (node in touched or smaller.intersection(node.all_input_nodes)):
                continue
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value_of)
            try:
                values[node] = node.target(*args, **kwargs)
            except (RuntimeError, ValueError, IndexError) as error:
                raise TraceError(
                    f"shrinking {node.name}",
                    found=f"it does not run any more ({first_line(error)})",
                    do="Report this as a bug, with the model",
                ) from error
            made = as_meta_tree(values[node])
            if _sizes_of(made) != _sizes_of(node.meta["val"]):
                node.meta["val"] = made
                smaller.add(node)


def _sizes_of(val: Any) -> Any:
    """The sizes of every tensor in a value, and whatever else it holds as it is."""
    if isinstance(val, Tensor):
        return val.dtype, tuple(val.shape)
    return [_sizes_of(each) for each in val] if isinstance(val, (tuple, list)) else val


def _empty(val: Any) -> Any:
    if isinstance(val, Tensor):
        return torch.empty(val.shape, dtype=val.dtype)
    return type(val)(map(_empty, val)) if isinstance(val, (tuple, list)) else val
