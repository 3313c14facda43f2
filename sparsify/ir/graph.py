"""Building FX graphs: nested graphs made flat, parameters under dotted names, values as meta tensors."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.errors import TraceError
from sparsify.ir.operators import placed
from sparsify.ir.program import Program


def empty_root(tensors: dict[str, Tensor]) -> nn.Module:
    """A tree of bare modules that holds a meta parameter under each dotted name."""
    root = nn.Module()
    for name, tensor in tensors.items():
        # Not by to("meta"): that is slow of a tensor that a trace has made up.
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        set_tensor(root, name, nn.Parameter(like, requires_grad=False))
    return root


def set_tensor(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter (or else a buffer) under a dotted name, making bare modules on the way where none are."""
    owner = root
    *path, leaf = name.split(".")
    for part in path:
        child = owner._modules.get(part)
        if child is None:
            owner.add_module(part, child := nn.Module())
        owner = child
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner.register_buffer(leaf, value)


def inline(
    source: fx.Graph,
    owner: nn.Module,
    target: fx.Graph,
    env: dict[fx.Node, Any],
    skip: Callable[[fx.Node], fx.Node | None],
) -> Any:
    """Append the nodes of ``source`` to ``target``, wrappers of grad mode and disabled autocast unwrapped.

    Args:
        env: what each placeholder of ``source`` stands for in ``target``; filled with the other nodes.
        skip: for a node that does nothing, the argument that stands for it; else None.

    Returns:
        What the output node of ``source`` returns, in terms of ``target``.
    """
    for node in source.nodes:
        if node in env:
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: env[n])
        if node.op == "get_attr":
            value = getattr(owner, str(node.target), None)
            if not isinstance(value, fx.GraphModule):
                raise TraceError(
                    f"capturing {node.name}",
                    found=f"a constant {node.target} inside a nested graph",
                    do="Report the model; its operator nests a graph that sparsify cannot flatten",
                )
            env[node] = value
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            env[node] = _inline_wrapper(node, target, env, skip)
            continue
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue
        parts = env.get(node.all_input_nodes[0]) if node.target is operator.getitem else None
        if isinstance(parts, (tuple, list)):
            # What a wrapper gave is a tuple of nodes, not a node that gives a tuple.
            env[node] = parts[node.args[1]]
            continue
        if (same := skip(node)) is not None:
            env[node] = env[same]
            continue
        copied = target.node_copy(node, lambda n: env[n])
        # A node's whole trace and module stack weigh more than the node; the model's own line is what an error shows.
        copied.meta = {"stack_trace": sys.intern(source_line(node)), "val": as_meta_tree(node.meta.get("val"))}
        env[node] = copied
    return None


def _inline_wrapper(
    node: fx.Node, target: fx.Graph, env: dict[fx.Node, Any], skip: Callable[[fx.Node], fx.Node | None]
) -> Any:
    name = str(node.target)
    at = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
    enabled_autocast = name == "wrap_with_autocast" and node.args[2]
    if at is None or enabled_autocast:
        raise TraceError(
            f"capturing {node.name}",
            found=f"the operator {name}{' with autocast on' if enabled_autocast else ''}",
            do="Only straight-line graphs can be pruned; rewrite this part of the model without control flow",
        )
    nested = node.args[at]
    assert isinstance(nested, fx.Node), "a wrapper calls a graph that a node holds"
    body = env[nested]
    inner: dict[fx.Node, Any] = {}
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    for placeholder, value in zip(placeholders, node.args[at + 1 :], strict=True):
        inner[placeholder] = env[value] if isinstance(value, fx.Node) else value
    return inline(body.graph, body, target, inner, skip)


def source_line(node: fx.Node) -> str:
    """The line of the model's own code that a node was traced from, as a traceback shows it."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ") and "/torch/nn/" not in line]
    return "\n".join(lines[frames[-1] : frames[-1] + 2]) if frames else ""


def as_meta_tree(value: Any) -> Any:
    """Meta tensors of the same shapes and dtypes in the place of tensors."""
    return fx.node.map_aggregate(value, _as_meta)


def _as_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def runnable(program: Program, device: torch.device) -> fx.GraphModule:
    """The graph of ``program`` as a module that runs by itself: every tensor is read into memory.

    It takes inputs of the shapes that the program was captured with, on ``device``.
    """
    root = nn.Module()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        value = program.load(node).to(device)
        constant = program.parameter(node) is None or not value.is_floating_point()
        set_tensor(root, str(node.target), value if constant else nn.Parameter(value, requires_grad=False))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    found: Any = graph.graph_copy(program.graph, copies)
    for node in graph.nodes:
        node.args, node.kwargs = placed(node, device)
    given = {node.meta["input"]: copies[node] for node in program.inputs}
    for number, way in enumerate(program.ways):
        # Beside the graph nothing asks the inputs any more: the module asks by itself.
        root.add_module(f"way_{number}", way.asked)
        # Copies, because a model may write to what it is given.
        values = tuple(graph.call_method("clone", (graph.call_method("cpu", (given[name],)),)) for name in way.inputs)
        asked = graph.call_module(f"way_{number}", values)
        graph.call_function(torch._assert, (asked, f"other inputs than the graph is for, at {way.where}"))
    # A single output is given as it is, not as a tuple of one.
    graph.output(found[0] if isinstance(found, (tuple, list)) and len(found) == 1 else found)
    return fx.GraphModule(root, graph)


def placeholder_values(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """What a ``torch.compile`` backend is given for each placeholder.

    Raises:
        TraceError: another number of values than placeholders.
    """
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(example_inputs):
        raise TraceError(
            "example_inputs of a graph",
            found=f"{len(example_inputs)} values for {len(placeholders)} placeholders",
            do="Pass on exactly what torch.compile gave the backend",
        )
    return dict(zip(placeholders, example_inputs, strict=True))
