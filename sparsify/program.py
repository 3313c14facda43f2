"""A captured model: one flat FX graph whose parameters live elsewhere.

The graph has one ``placeholder`` per input tensor and one ``get_attr`` per parameter, buffer or constant, named as in
the model. Parameters are on the meta device in the graph module; their values come from :class:`Weights` when needed.
``node.meta["val"]`` is a meta tensor with the shape and dtype of the node's value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.errors import TraceError, VerifyError
from sparsify.source import Source
from sparsify.weights import Weights


@dataclass
class Program:
    """What every analysis, pass and backend works on.

    Attributes:
        graph_module: the graph; parameters are meta tensors in it.
        weights: values of the parameters and of buffers that the checkpoint holds.
        constants: values of all other ``get_attr`` targets (rotary frequencies, literal tensors).
        output_names: names of the flat outputs where the model gives them, else "0", "1", ….
        source: the model that was captured, where it came from one.
    """

    graph_module: fx.GraphModule
    weights: Weights
    constants: dict[str, Tensor]
    output_names: list[str] = field(default_factory=list)
    source: Source | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def parameter(self, node: fx.Node) -> str | None:
        """The parameter or buffer that a ``get_attr`` node reads, or None for any other node."""
        if node.op == "get_attr" and node.target not in self.constants:
            return str(node.target)
        return None

    def load(self, node: fx.Node) -> Tensor:
        """The value of a ``get_attr`` node, in the dtype that the graph computes with."""
        target = str(node.target)
        if target in self.constants:
            return self.constants[target]
        return self.weights.read(target).to(node.meta["val"].dtype)

    def to(self, device: torch.device) -> None:
        """Make every operator that names a device name ``device``, and move the constants there."""
        for node in self.graph.nodes:
            node.args = fx.node.map_aggregate(node.args, lambda a: device if isinstance(a, torch.device) else a)
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: device if isinstance(a, torch.device) else a)
        self.constants = {name: value.to(device) for name, value in self.constants.items()}
        self.graph_module.recompile()

    def verify(self) -> None:
        """Check what every stage relies on.

        Raises:
            VerifyError: the graph does not lint, names the meta device, or reads a tensor that nothing holds.
        """
        try:
            self.graph.lint()
        except RuntimeError as error:
            raise VerifyError("the graph", found=f"it does not lint ({error})", do="Report this as a bug") from error
        for node in self.graph.nodes:
            if any(device.type == "meta" for device in _devices(node)):
                raise VerifyError(f"node {node.name}", found="it names the meta device", do="Report this as a bug")
            if node.op == "get_attr" and node.target not in self.constants and node.target not in self.weights:
                raise VerifyError(f"node {node.name}", found=f"no tensor {node.target}", do="Report this as a bug")


def _devices(node: fx.Node) -> list[torch.device]:
    """Devices named in the arguments of ``node``."""
    found: list[torch.device] = []

    def note(value: Any) -> Any:
        if isinstance(value, torch.device):
            found.append(value)
        return value

    fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


def empty_root(tensors: dict[str, Tensor]) -> nn.Module:
    """A tree of bare modules that holds a meta parameter under each dotted name."""
    root = nn.Module()
    for name, tensor in tensors.items():
        set_tensor(root, name, nn.Parameter(tensor.detach().to("meta"), requires_grad=False))
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
    body = env[node.args[at]]  # type: ignore[index]
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
