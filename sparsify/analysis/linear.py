"""Linear sites: where a graph contracts an activation with a parameter.

A site says which axis of its parameter counts output neurons, which counts input features and which counts experts,
so that everything after sees (out_features, in_features) whatever the storage: ``nn.Linear``, GPT-2's ``Conv1D``,
a transposed matmul, a 1×1 convolution, a stack of experts. A contraction with a parameter that is not understood is
reported as :class:`Opaque` with the reason, never passed over.

A layer (linear, a convolution) is a site whatever it multiplies, be it a table that no batch changes: queries that are
learned, coordinates of positions. A product of two parameters by another operator makes a weight, and is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow
from sparsify.analysis.parameter_view import is_scaled, through_views
from sparsify.analysis.window import Window, window_of
from sparsify.errors import Refused
from sparsify.ir.operators import GROUPED_PRODUCTS, argument, operator_name
from sparsify.ir.program import Program

aten = torch.ops.aten

_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d}
# Operators that multiply and add over an axis; what reads a parameter here and is no site is Opaque.
_CONTRACTIONS = {
    "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "addbmm", "einsum", "mv", "addmv", "dot", "vdot", "tensordot",
    "inner", "bilinear", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "conv_tbc", "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "_scaled_mm", "_int_mm", "multi_head_attention_forward", "_native_multi_head_attention",
} | GROUPED_PRODUCTS  # fmt: skip
_WITH_BIAS = {"linear", "addmm", "conv1d", "conv2d", "conv3d"}
_WITH_ADDEND = _WITH_BIAS | {"baddbmm", "scaled_dot_product_attention"}
# From a router's scores to the choice of experts, nothing but these happens.
_ROUTING = {"softmax", "sigmoid", "view", "reshape", "to", "add", "_to_copy", "contiguous", "div", "sum", "topk",
            "getitem", "squeeze", "float", "masked_fill", "scatter", "group_norm", "mul", "sub", "max"}  # fmt: skip


@dataclass(frozen=True)
class LinearSite:
    """One contraction of an activation with a parameter.

    Attributes:
        node: the contraction. ``activation``: its input. ``feature_dim``: the axis of that input that is summed over.
        parameter: the parameter's name in the model; ``name`` is that of its module.
        out_axis, in_axis, expert_axis: axes of the parameter (expert_axis None for a plain matrix).
        shape: (out_features, in_features); ``experts``: how many such matrices the parameter stacks, or is cut into.
        offsets: for experts, the node that holds where each expert's rows end in the activation.
        window: for a convolution with a kernel, how it is laid over the input; in_features are then the inputs that
            it sees at one place, and a depth-wise one is a stack of [1, size] matrices, one per channel.
        bias: name of the parameter that is added to the output, or None.
        block: name of the repeated block it is in ("model.layers.3"), or None.
        router: True where its output chooses experts.
        scaled: True where the parameter is multiplied by a number before it is by the activation.
    """

    node: fx.Node
    parameter: str
    activation: fx.Node
    feature_dim: int
    out_axis: int
    in_axis: int
    expert_axis: int | None
    shape: tuple[int, int]
    experts: int = 1
    offsets: fx.Node | None = None
    window: Window | None = None
    bias: str | None = None
    block: str | None = None
    router: bool = False
    scaled: bool = False

    @property
    def name(self) -> str:
        return self.parameter.removesuffix(".weight")

    @property
    def kind(self) -> str:
        """The name with its numbers left out: what the same site is called in every block."""
        return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", self.name)

    def matrices(self, weight: Tensor) -> Tensor:
        """View the parameter as [experts, out_features, in_features], whatever its layout."""
        lead = [] if self.expert_axis is None else [self.expert_axis]
        rest = [a for a in range(weight.dim()) if a not in (*lead, self.out_axis, self.in_axis)]
        moved = weight.permute(*lead, self.out_axis, self.in_axis, *rest)
        return moved.reshape(self.experts, *self.shape)

    def layout(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`matrices`: [experts, out_features, in_features] to the parameter's own layout."""
        lead = [] if self.expert_axis is None else [self.expert_axis]
        rest = [a for a in range(like.dim()) if a not in (*lead, self.out_axis, self.in_axis)]
        order = [*lead, self.out_axis, self.in_axis, *rest]
        moved = matrices.reshape([like.shape[a] for a in order])
        return moved.permute([order.index(a) for a in range(like.dim())]).contiguous()

    def biases(self, bias: Tensor) -> Tensor:
        """View the bias as [experts, out_features]: of a depth-wise convolution each channel has one number."""
        return bias.reshape(self.experts, self.shape[0])

    @property
    def grouped(self) -> bool:
        """Whether one matrix is cut into groups of output neurons, each with its own part of the activation."""
        return self.expert_axis is None and self.experts > 1

    def __str__(self) -> str:
        stack = f"{self.experts} × " if self.experts > 1 or self.expert_axis is not None else ""
        return f"{self.name}: {stack}{self.shape[0]} output neurons × {self.shape[1]} inputs"


@dataclass(frozen=True)
class Opaque:
    """A contraction with a parameter that cannot be pruned here, and why."""

    node: fx.Node
    parameters: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{', '.join(self.parameters)}: {self.reason}"


@dataclass
class InputGroup:
    """Sites of one block that read the same activation: they share one set of statistics."""

    activation: fx.Node
    feature_dim: int
    sites: list[LinearSite] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.sites[0].name

    @property
    def block(self) -> str | None:
        return self.sites[0].block

    def __str__(self) -> str:
        names = [site.name for site in self.sites]
        prefix = names[0].rpartition(".")[0]
        short = [n.removeprefix(prefix + ".") for n in names]
        return f"{', '.join(short)} of {prefix or 'the model'} read {self.activation.name}"


Sites = tuple[tuple[LinearSite, ...], tuple[Opaque, ...]]


def find_sites(program: Program) -> Sites:
    """All contractions with a parameter, in topological order: those understood, and those not. Found once a graph."""
    return program.fact(_search)


def _search(program: Program) -> Sites:
    flow = Flow.of(program)
    sites: list[LinearSite] = []
    opaque: list[Opaque] = []
    # What is made of the outputs of layers that read no input: activations, though no batch changes them.
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        fixed = node not in flow.varying
        if fixed and not constant.isdisjoint(node.all_input_nodes):
            constant.add(node)
        layer = operator_name(node) in (_WITH_BIAS if fixed else _CONTRACTIONS)
        if node.op != "call_function" or not layer:
            continue
        held = [a for a in node.all_input_nodes if flow.parameters.get(a) and a not in constant]
        if operator_name(node) in _WITH_ADDEND:
            held = [a for a in held if a is not _addend(node)]
        if not held:
            continue
        if fixed:
            constant.add(node)
        found = _site(program, node)
        if isinstance(found, LinearSite):
            sites.append(found)
        else:
            names = tuple(sorted({p for a in held for p in flow.parameters[a]}))
            opaque.append(Opaque(node, names, found.reason))
    return tuple(sites), tuple(opaque)


def group_by_input(sites: Sequence[LinearSite]) -> list[InputGroup]:
    """Sites by (block, activation), ordered by the first site of each group."""
    groups: dict[tuple[object, ...], InputGroup] = {}
    for site in sites:
        key = (site.block, site.activation, site.feature_dim, site.experts, site.offsets, site.window)
        groups.setdefault(key, InputGroup(site.activation, site.feature_dim)).sites.append(site)
    return list(groups.values())


def block_starts(program: Program, flow: Flow) -> list[int]:
    """Positions of the first site of each repeated block: where a graph is best cut into regions."""
    starts: dict[str, int] = {}
    for site in find_sites(program)[0]:
        # What no batch changes may stand far before its block.
        if site.block is not None and site.node in flow.varying:
            at = flow.position[site.node]
            starts[site.block] = min(starts.get(site.block, at), at)
    return sorted(set(starts.values()))


def block_of(parameter: str) -> str | None:
    """The repeated block that a parameter is in: its name up to the first number under a named container.

    ``stages.N`` of vision models only gathers blocks of one width; the block is the number below it.
    """
    match = re.match(r"(?:[^.]+\.)*?stages\.\d+\.[a-z_]+\.\d+(?=\.)", parameter) or re.match(
        r"[^.\d][^.]*(?:\.[^.\d][^.]*)*\.\d+(?=\.)", parameter
    )
    return match[0] if match else None


def _addend(node: fx.Node) -> object:
    """The operand that is added, not multiplied: a bias, or an attention mask."""
    if operator_name(node) in ("addmm", "baddbmm"):
        return node.args[0]
    if operator_name(node) == "scaled_dot_product_attention":
        return argument(node, 3, "attn_mask")
    return argument(node, 2, "bias")


def _bias(program: Program, node: fx.Node) -> str | None:
    added = _addend(node) if operator_name(node) in _WITH_BIAS else None
    name = program.parameter(added) if isinstance(added, fx.Node) else None
    return program.weights.canonical(name) if name else None


def _site(program: Program, node: fx.Node) -> LinearSite | Refused:
    """The site at ``node``, or why it is none."""
    packet = getattr(node.target, "_overloadpacket", None)
    if packet is aten.linear:
        return _matrix_site(program, node, node.args[0], node.args[1], transposed=True)
    if packet in (aten.mm, aten.matmul, aten.bmm, aten.addmm):
        left, right = node.args[1:3] if packet is aten.addmm else node.args[:2]
        if isinstance(right, fx.Node) and through_views(program, right):
            return _matrix_site(program, node, left, right, transposed=False)
        if isinstance(left, fx.Node) and through_views(program, left):
            return _left_site(program, node, left, right)
        return Refused("the parameter is computed with before it is multiplied", node.name)
    if packet in _CONVOLUTIONS:
        return _convolution_site(program, node)
    if operator_name(node) in GROUPED_PRODUCTS:
        return _matrix_site(program, node, node.args[0], node.args[1], transposed=False, offsets=node.args[2])
    return Refused(f"the operator {operator_name(node)} is not one whose weight sparsify can prune", node.name)


def _matrix_site(
    program: Program, node: fx.Node, x: object, w: object, *, transposed: bool, offsets: object = None
) -> LinearSite | Refused:
    found = through_views(program, w)
    if found is None or not isinstance(x, fx.Node):
        return Refused("the parameter is computed with before it is multiplied", node.name)
    source, axes = found
    if len(axes) not in (2, 3) or (len(axes) == 3 and transposed):
        return Refused(f"a parameter of {len(axes)} dimensions is no matrix", node.name)
    out, inner = (axes[-2], axes[-1]) if transposed else (axes[-1], axes[-2])
    expert = axes[0] if len(axes) == 3 else None
    if min(axes) < 0:
        # A linear layer in groups: each multiplies its own part of the activation by its own output neurons.
        if expert != ~out or offsets is not None or x.meta["val"].dim() != 3:
            return Refused("an axis of the parameter is split into groups that are no output neurons", node.name)
        site, groups = _make(program, node, source, x, -1, out, inner, None, None), x.meta["val"].shape[0]
        if isinstance(site, Refused):
            return site
        return replace(site, experts=groups, shape=(site.shape[0] // groups, site.shape[1]))
    if expert is not None and offsets is None and x.meta["val"].dim() != 3:
        return Refused("a stack of matrices multiplies an activation that is not split by expert", node.name)
    return _make(program, node, source, x, -1, out, inner, expert, offsets)


def _left_site(program: Program, node: fx.Node, w: fx.Node, x: object) -> LinearSite | Refused:
    """``W @ x``: the input features are the last axis but one of the activation (Mamba's dt_proj)."""
    found = through_views(program, w)
    if found is None or len(found[1]) != 2 or not isinstance(x, fx.Node) or x.meta["val"].dim() < 2:
        return Refused("only a matrix may stand on the left of an activation", node.name)
    source, axes = found
    return _make(program, node, source, x, -2, axes[0], axes[1], None, None)


def _convolution_site(program: Program, node: fx.Node) -> LinearSite | Refused:
    assert isinstance(node.args[1], fx.Node)
    window = window_of(node)
    if isinstance(window, Refused):
        return window
    found, x = through_views(program, node.args[1]), node.args[0]
    if found is None or not isinstance(x, fx.Node):
        return Refused("the kernel is computed before it is applied", node.name)
    if found[1] != list(range(len(window.kernel) + 2)):
        return Refused("the kernel's axes are permuted before it is applied", node.name)
    pointwise = all(k == 1 for k in window.kernel) and all(s == 1 for s in window.stride) and not window.depthwise
    if pointwise and not any(window.padding):
        return _make(program, node, found[0], x, -1 - len(window.kernel), 0, 1, None, None)
    if x.meta["val"].dim() != len(window.kernel) + 2:
        return Refused("a convolution of an input without a batch axis", node.name)
    axes = (1, 2, 0) if window.depthwise else (0, 1, None)
    site = _make(program, node, found[0], x, 1, axes[0], axes[1], axes[2], None)
    if isinstance(site, Refused):
        return site
    shape = found[0].meta["val"].shape
    size = math.prod(window.kernel)
    return replace(site, window=window, shape=(1, size) if window.depthwise else (shape[0], shape[1] * size))


def _make(
    program: Program,
    node: fx.Node,
    source: fx.Node,
    x: fx.Node,
    feature_dim: int,
    out: int,
    inner: int,
    expert: int | None,
    offsets: object,
) -> LinearSite | Refused:
    shape = source.meta["val"].shape
    name = program.weights.canonical(str(source.target))
    bias, scaled = _bias(program, node), is_scaled(program, node)
    if bias is not None and scaled:
        return Refused("the parameter is multiplied by a number, and the bias beside it is not", node.name)
    return LinearSite(
        node=node,
        parameter=name,
        activation=x,
        feature_dim=feature_dim,
        out_axis=out,
        in_axis=inner,
        expert_axis=expert,
        shape=(shape[out], shape[inner]),
        experts=1 if expert is None else shape[expert],
        offsets=offsets if isinstance(offsets, fx.Node) else None,
        bias=bias,
        block=block_of(name),
        router=_chooses_experts(node),
        scaled=scaled,
    )


def _chooses_experts(node: fx.Node) -> bool:
    """Whether the output reaches a ``topk`` through score arithmetic alone."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user in seen or user.op != "call_function" or operator_name(user) not in _ROUTING:
                continue
            if operator_name(user) == "topk":
                return True
            seen.add(user)
            todo.append(user)
    return False
