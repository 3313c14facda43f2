"""Lower a graph to packed weights: products with a pruned weight become ``sparsify::linear_24`` or ``linear_bitmask``,
and on a GPU ``sparsify::linear_24_prepared``.

For graphs of any compiler: ``LowerSparse()(graph_module)`` on what ``torch.fx.symbolic_trace`` or ``torch.export``
gave; :mod:`sparsify.passes.lowering.dynamo` runs it under ``torch.compile``. Weights on a grid of 8 or 4 bits, as the
pass ``round`` leaves them, are held as its integers, by the operators whose names end in ``_few``.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from sparsify.analysis.contraction import Contraction, NotUnderstood, find_contractions
from sparsify.analysis.graph_pass import LoweringPass
from sparsify.errors import Refused, SpecError, TraceError
from sparsify.ir.graph import placeholder_values
from sparsify.passes.lowering.choosing import Packer
from sparsify.passes.lowering.record import Lowered
from sparsify.passes.lowering.rewrite import Rewriter
from sparsify.runtime.cpu.stopwatch import FASTER
from sparsify.runtime.cuda.gpu import GPU
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.words import Activations, AskedFewLayout, FoundValues, PackingChoice, Policy


@dataclass(frozen=True)
class LowerSparse(LoweringPass):
    """The graph with its pruned weights packed.

    The result's ``graph_module.meta["sparsify"]`` lists a :class:`Lowered` for every contraction with a constant
    weight.

    Attributes:
        layout: ``auto`` takes packed24 where a weight is 2:4 along its inputs and a bitmask elsewhere; of integers,
            ``dense`` where zeros make nothing smaller.
        choice: ``measured`` keeps a weight dense where a token is measured to take longer packed, once per shape,
            dtype, layout and number of threads; ``smallest`` packs whatever becomes smaller, and measures nothing.
        merge: join siblings that read one input (q/k/v, gate/up) into one packed matrix: on a GPU, and on a CPU where
            that is measured faster.
        dense: give weights that stay dense our kernel for one token where that is measured faster (needs ``measured``).
        policy: of weights on a GPU: ``decode`` keeps them for few tokens, ``prefill`` for many, ``both`` twice.
        target: a GPU to lower for, in the place of the device that the weights lie on. Nothing is measured for it, and
            until the graph is moved there a plain reference runs it.
        values: ``auto`` holds weights that lie on a grid of 8 or 4 bits to the bit as integers and scales, on CPUs,
            zeros or none: for ``measured`` where a token is faster so, for ``smallest`` where it is smaller; ``full``
            keeps the width of their dtype.
        activations: of weights held as integers: ``float`` multiplies inputs as they are; ``int8`` rounds those of up
            to 16 tokens to 8 bits by token and group, which is faster.
    """

    layout: AskedFewLayout = "auto"
    choice: PackingChoice = "measured"
    merge: bool = True
    dense: bool = True
    policy: Policy = "decode"
    target: GPU | None = field(default=None, metadata={"text": False})
    values: FoundValues = "auto"
    activations: Activations = "float"

    name: ClassVar[str] = "lower-sparse"
    summary: ClassVar[str] = "pruned weights packed, products with them by our operators"
    when: ClassVar[str] = "from Python, last: to run a pruned module in torch; for files take --to packed or cuda"
    example: ClassVar[str] = "lower-sparse:policy=decode"

    def __post_init__(self) -> None:
        if self.values == "full" and (self.layout == "dense" or self.activations != "float"):
            asked = "layout=dense" if self.layout == "dense" else f"activations={self.activations}"
            raise SpecError(
                f"{self.name}:values=full,{asked}",
                found="an option of weights held as integers",
                do=f"Leave {asked} out, or values=full",
            )

    def lower(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return self(graph_module).graph_module

    def __call__(
        self,
        graph_module: fx.GraphModule | torch.export.ExportedProgram,
        example_inputs: Sequence[object] | None = None,
    ) -> PassResult:
        """As a pass of ``torch.fx``: return the lowered graph; the one given is not changed.

        Args:
            example_inputs: values of all placeholders, among which those that are ``nn.Parameter`` are weights.

        Raises:
            TraceError: no graph, or example inputs that are not its own.
        """
        graph = graph_module.module() if isinstance(graph_module, torch.export.ExportedProgram) else graph_module
        if not isinstance(graph, fx.GraphModule):
            raise TraceError(
                f"pass {self.name}",
                found=f"a {type(graph).__name__}",
                do="Give a torch.fx.GraphModule or an ExportedProgram; of a module torch.compile(backend='sparsify')",
            )
        shared = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
        result = copy.deepcopy(graph, memo=dict(shared))
        given = _parameters(result, example_inputs)
        found, lost = find_contractions(result, given)
        packer = Packer(self.layout, self.choice, self.policy, self.target, self.values, self.activations)
        run = _Run(self, packer, Rewriter(result, given))
        run.lower(found)
        modified = run.rewriter.finish()
        records = [*run.records, *(Lowered.dense(item, item.reason) for item in lost)]
        items: list[Contraction | NotUnderstood] = [*found, *lost]
        order = {item.node.name: i for i, item in enumerate(items)}
        result.meta["sparsify"] = sorted(records, key=lambda r: order[r.node])
        return PassResult(result, modified)


_Group = list[tuple[Contraction, PackedWeight]]


@dataclass
class _Run:
    """The pass over one graph: what ``packer`` decides of each weight, ``rewriter`` does to its nodes."""

    options: LowerSparse
    packer: Packer
    rewriter: Rewriter
    records: list[Lowered] = field(default_factory=list)

    def lower(self, contractions: list[Contraction]) -> None:
        chosen: _Group = []
        for c in contractions:
            packed = self.packer.packed(c.weight)
            if isinstance(packed, Refused):
                self._stay_dense(c, packed.reason)
            else:
                chosen.append((c, packed))
        for group in self._groups(chosen):
            if self.packer.gpu(group[0][0].weight) is not None:
                self._lower_on_gpu(group)
            else:
                self._lower_on_cpu(group)

    def _groups(self, chosen: _Group) -> list[_Group]:
        """Siblings that could be one product, together."""
        groups: dict[tuple[Hashable, ...], _Group] = {}
        for c, weight in chosen:
            alone = c.offsets is not None or (c.bias is not None and self.rewriter.known_bias(c) is None)
            unmeasured = self.packer.gpu(c.weight) is None and not self.packer.measures
            apart = c.node if alone or unmeasured or not self.options.merge else None
            alike = (weight.layout, weight.columns, weight.dtype, weight.packed.bits, weight.packed.group)
            groups.setdefault((c.x, *alike, apart), []).append((c, weight))
        return list(groups.values())

    def _joinable(self, group: _Group) -> bool:
        distinct = len({id(weight) for _, weight in group}) == len(group)
        return distinct and not self.rewriter.written_between([c for c, _ in group])

    def _lower_on_cpu(self, group: _Group) -> None:
        sites, weights = [c for c, _ in group], [weight for _, weight in group]
        joined = self.packer.joined(weights) if len(group) > 1 and self._joinable(group) else None
        for c, weight in group:
            merged = _others(c, sites) if joined is not None else ()
            self.records.append(Lowered.packed(c, weight, merged, timing=self.packer.timing(c.weight)))
            if joined is None:
                self.rewriter.pack(c, weight)
        if joined is not None:
            self.rewriter.merge(sites, joined)

    def _lower_on_gpu(self, group: _Group) -> None:
        """Siblings become one matrix: a GPU is filled by many rows, and every launch saved counts."""
        whole = len(group) == 1 or self._joinable(group)
        for part in [group] if whole else [[one] for one in group]:
            sites = [c for c, _ in part]
            weight = self.packer.prepared([packed for _, packed in part])
            if isinstance(weight, Refused):
                for c in sites:
                    self._stay_dense(c, weight.reason)
                continue
            if len(part) == 1:
                self.rewriter.pack(sites[0], weight)
            else:
                self.rewriter.merge(sites, weight)
            gains = {tokens: weight.timings.gain(tokens) for tokens in weight.timings.micro}
            for c in sites:
                self.records.append(Lowered.packed(c, weight, _others(c, sites), plan=str(weight.plan), gains=gains))

    def _stay_dense(self, c: Contraction, reason: str) -> None:
        weight, timing = c.weight, self.packer.timing(c.weight)
        plain = weight.dim() == 2 and weight.is_contiguous() and c.node.op != "call_module"
        kernel = "as it was"
        measured = self.packer.measures and self.options.dense
        if measured and plain and weight.device.type == "cpu" and weight.is_floating_point():
            timing = self.packer.dense_timing(weight)
            if timing.dense < FASTER * timing.torch:
                self.rewriter.dense(c)
                kernel = "sparsify.linear_dense.default"
        self.records.append(Lowered.dense(c, reason, kernel, timing))


def _others(c: Contraction, group: Sequence[Contraction]) -> tuple[str, ...]:
    return tuple(other.name for other in group if other is not c)


def _parameters(module: fx.GraphModule, example_inputs: Sequence[object] | None) -> dict[fx.Node, Tensor]:
    """Placeholders that are parameters, with their values."""
    if example_inputs is None:
        return {}
    values = placeholder_values(module, example_inputs)
    return {node: value.detach() for node, value in values.items() if isinstance(value, nn.Parameter)}
