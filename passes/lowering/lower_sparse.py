"""Lower a graph to packed weights: products with a pruned weight become ``sparsify::linear_24`` or ``linear_bitmask``,
and on a GPU ``sparsify::linear_24_prepared``.

For graphs of any compiler: ``LowerSparse()(graph_module)`` on what ``torch.fx.symbolic_trace`` or ``torch.export``
gave, or ``torch.compile(model, backend="sparsify")``, which runs it in front of Inductor.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from sparsify.analysis.contraction import Contraction, NotUnderstood, find_contractions
from sparsify.errors import BackendError, Refused, TraceError
from sparsify.ir.graph import placeholder_values
from sparsify.passes.lowering.rewrite import Rewriter
from sparsify.runtime.cuda.dispatch import Policy
from sparsify.runtime.cuda.prepared import PreparedWeight, Target, prepare
from sparsify.runtime.layout import choose_layout, concatenate
from sparsify.runtime.packed_weight import PackedWeight
from sparsify.runtime.stopwatch import LEAST, Stopwatch, Timing


@dataclass(frozen=True)
class Lowered:
    """What became of one contraction: ``layout`` is packed24, bitmask or dense; ``reason``: why it is dense.

    ``kernel``: what runs it; ``merged``: the other weights that one packed matrix holds with it. On a GPU ``plan`` says
    which kernel serves how many tokens (:mod:`sparsify.runtime.cuda.dispatch`), and ``gains`` how much faster than cuBLAS it
    was measured to be, by token count.
    """

    name: str
    node: str
    shape: tuple[int, ...]
    layout: str
    kernel: str
    reason: str | None = None
    timing: Timing | None = None
    merged: tuple[str, ...] = ()
    plan: str | None = None
    gains: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LowerSparse:
    """A pass of ``torch.fx``: the graph with its pruned weights packed.

    The result's ``graph_module.meta["sparsify"]`` lists a :class:`Lowered` for every contraction with a constant
    weight.

    Attributes:
        layout: ``auto`` takes packed24 where a weight is 2:4 along its inputs and a bitmask elsewhere.
        choice: ``measured`` keeps a weight dense where a token is measured to take longer packed, once per shape,
            dtype, layout and number of threads; ``smallest`` packs whatever becomes smaller, and measures nothing.
        merge: join siblings that read one input (q/k/v, gate/up) into one packed matrix: on a GPU, and on a CPU where
            that is measured faster.
        dense: give weights that stay dense our kernel for one token where that is measured faster (needs ``measured``).
        policy: of weights on a GPU: ``decode`` keeps them for few tokens, ``prefill`` for many, ``both`` twice.
        target: a GPU to lower for, in the place of the device that the weights lie on. Nothing is measured for it, and
            until the graph is moved there a plain reference runs it.
    """

    layout: Literal["auto", "packed24", "bitmask"] = "auto"
    choice: Literal["measured", "smallest"] = "measured"
    merge: bool = True
    dense: bool = True
    policy: Policy = "decode"
    target: Target | None = None

    name: ClassVar[str] = "lower-sparse"

    def bind(self, *, example_inputs: Sequence[Any] | None = None) -> Callable[..., PassResult]:
        """This pass with what a ``torch.compile`` backend is given beside the graph."""
        return functools.partial(self, example_inputs=example_inputs)

    def __call__(
        self,
        graph_module: fx.GraphModule | torch.export.ExportedProgram,
        example_inputs: Sequence[Any] | None = None,
    ) -> PassResult:
        """Return the lowered graph; the one given is not changed.

        Args:
            example_inputs: values of all placeholders, among which those that are ``nn.Parameter`` are weights.

        Raises:
            TraceError: no graph, or example inputs that are not its own.
        """
        graph: Any = graph_module
        if isinstance(graph, torch.export.ExportedProgram):
            graph = graph.module()
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
        lowering = _Lowering(self, Rewriter(result, given))
        lowering.lower(found)
        modified = lowering.rewriter.finish()
        records = [*lowering.records, *(_dense(item, item.reason) for item in lost)]
        items: list[Contraction | NotUnderstood] = [*found, *lost]
        order = {item.node.name: i for i, item in enumerate(items)}
        result.meta["sparsify"] = sorted(records, key=lambda r: order[r.node])
        return PassResult(result, modified)


@dataclass
class _Lowering:
    """One run of the pass over one graph."""

    options: LowerSparse
    rewriter: Rewriter
    watch: Stopwatch = field(default_factory=Stopwatch)
    records: list[Lowered] = field(default_factory=list)
    _packed: dict[tuple[Any, ...], PackedWeight | Refused] = field(default_factory=dict)
    _timings: dict[tuple[Any, ...], Timing] = field(default_factory=dict)
    # Kept until the end: the rewriter knows them by their identity.
    _prepared: list[PreparedWeight] = field(default_factory=list)

    def lower(self, contractions: list[Contraction]) -> None:
        chosen: list[tuple[Contraction, PackedWeight]] = []
        for c in contractions:
            packed = self._pack(c.weight)
            if isinstance(packed, Refused):
                self._stay_dense(c, packed.reason)
            else:
                chosen.append((c, packed))
        for group in self._groups(chosen):
            if self._target(group[0][0].weight) is not None:
                self._lower_on_gpu(group)
                continue
            sites, weights = [c for c, _ in group], [w for _, w in group]
            joined = self._join(sites, weights)
            for c, weight in group:
                others = tuple(o.name for o in sites if joined is not None and o is not c)
                self.records.append(
                    Lowered(
                        c.name, c.node.name, tuple(c.weight.shape), weight.packed.layout, str(weight.operator), None,
                        self._timings.get(_key(c.weight)), others,
                    )
                )  # fmt: skip
                if joined is None:
                    self.rewriter.pack(c, weight)
            if joined is not None:
                self.rewriter.merge(sites, joined)

    def _pack(self, weight: Tensor) -> PackedWeight | Refused:
        """The weight packed, or why it stays dense; one that several nodes read is packed once."""
        key = _key(weight)
        if key not in self._packed:
            self._packed[key] = self._pack_anew(weight)
        return self._packed[key]

    def _pack_anew(self, weight: Tensor) -> PackedWeight | Refused:
        target, asked = self._target(weight), self.options.layout
        if target is None and weight.device.type != "cpu":
            return Refused(f"on {weight.device}, where there are no packed kernels")
        if target is not None:
            if weight.dim() != 2:
                return Refused("a stack of experts, for which there is no GPU kernel")
            if (unfit := target.unfit(weight.dtype, "bitmask" if asked == "bitmask" else "packed24")) is not None:
                return Refused(unfit)
            asked = "packed24"
        layout = choose_layout(weight.reshape(-1, weight.shape[-1]), asked)
        if isinstance(layout, Refused):
            return layout
        packed = PackedWeight.of(weight, layout)
        if target is None and self.options.choice == "measured":
            # Experts are alike: one tells the time of all.
            one = packed if weight.dim() == 2 else PackedWeight.of(weight[0], layout)
            timing = self.watch.packed(weight if weight.dim() == 2 else weight[0], one)
            self._timings[_key(weight)] = timing
            if not timing.pays:
                return Refused(f"dense is faster here ({layout} takes {timing.ratio:.2f}× its time)")
        return packed

    def _groups(self, chosen: list[tuple[Contraction, PackedWeight]]) -> list[list[tuple[Contraction, PackedWeight]]]:
        """Siblings that could be one product, together."""
        groups: dict[tuple[Any, ...], list[tuple[Contraction, PackedWeight]]] = {}
        for c, weight in chosen:
            alone = c.offsets is not None or (c.bias is not None and self.rewriter.known_bias(c) is None)
            unmeasured = self._target(c.weight) is None and self.options.choice != "measured"
            apart = c.node if alone or unmeasured or not self.options.merge else None
            key = (c.x, weight.packed.layout, weight.packed.shape[1], weight.packed.values.dtype, apart)
            groups.setdefault(key, []).append((c, weight))
        return list(groups.values())

    def _join(self, sites: list[Contraction], weights: list[PackedWeight]) -> PackedWeight | None:
        """The siblings as one matrix, where one product with it is measured faster than one with each."""
        distinct = len({id(w) for w in weights}) == len(weights)
        if len(weights) < 2 or not distinct or self.rewriter.written_between(sites):
            return None
        joined = PackedWeight.joined(weights)
        x = torch.randn(1, joined.packed.shape[1]).to(joined.packed.values.dtype)
        sizes = [w.rows for w in weights]
        apart, together = self.watch.race([
            lambda: [w.linear(x) for w in weights],
            lambda: torch.split_with_sizes_copy(joined.linear(x), sizes, -1),
        ])  # fmt: skip
        return joined if together < LEAST * apart else None

    def _target(self, weight: Tensor) -> Target | None:
        """The GPU that ``weight`` is lowered for; None on a CPU."""
        if self.options.target is not None:
            return self.options.target
        return Target.of(weight.device) if weight.device.type == "cuda" else None

    def _lower_on_gpu(self, group: list[tuple[Contraction, PackedWeight]]) -> None:
        """Siblings become one matrix: a GPU is filled by many rows, and every launch saved counts."""
        distinct = len({id(w) for _, w in group}) == len(group)
        whole = len(group) == 1 or (distinct and not self.rewriter.written_between([c for c, _ in group]))
        for part in [group] if whole else [[one] for one in group]:
            sites = [c for c, _ in part]
            packed = part[0][1].packed if len(part) == 1 else concatenate([w.packed for _, w in part])
            measured = self.options.choice == "measured"
            weight = prepare(packed, self.options.policy, tune=measured, target=self.options.target)
            if isinstance(weight, Refused):
                for c in sites:
                    self._stay_dense(c, weight.reason)
                continue
            self._prepared.append(weight)
            if len(part) == 1:
                self.rewriter.pack(sites[0], weight)
            else:
                self.rewriter.merge(sites, weight)
            gains = {tokens: weight.timings.gain(tokens) for tokens in weight.timings.micro}
            for c in sites:
                others = tuple(o.name for o in sites if o is not c)
                self.records.append(
                    Lowered(
                        c.name, c.node.name, tuple(c.weight.shape), weight.layout, str(weight.operator), None, None,
                        others, str(weight.plan), gains,
                    )
                )  # fmt: skip

    def _stay_dense(self, c: Contraction, reason: str) -> None:
        weight = c.weight
        timing = self._timings.get(_key(weight))
        plain = weight.dim() == 2 and weight.is_contiguous() and c.node.op != "call_module"
        kernel = "as it was"
        measured = self.options.choice == "measured" and self.options.dense
        if measured and plain and weight.device.type == "cpu" and weight.is_floating_point():
            timing = timing or self.watch.dense(weight)
            if timing.dense < LEAST * timing.torch:
                self.rewriter.dense(c)
                kernel = "sparsify.linear_dense.default"
        self.records.append(Lowered(c.name, c.node.name, tuple(weight.shape), "dense", kernel, reason, timing))


def dynamo_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """``torch.compile(model, backend="sparsify")``: pruned weights packed, the rest compiled by Inductor.

    The packed copies are taken when the model is compiled: change its weights, and it has to be compiled again.

    Raises:
        BackendError: compiled where gradients are wanted.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    lowered = LowerSparse()(graph_module, example_inputs)
    records: list[Lowered] = lowered.graph_module.meta["sparsify"]
    packed = [r for r in records if r.layout != "dense"]
    if packed and torch.is_grad_enabled() and any(getattr(v, "requires_grad", False) for v in example_inputs):
        raise BackendError(
            "torch.compile(backend='sparsify')",
            found="gradients are on, and packed weights have none",
            do="Run the model under torch.no_grad() or torch.inference_mode()",
        )
    if records and not packed:
        reasons = sorted({r.reason for r in records if r.reason is not None})
        warnings.warn(
            f"torch.compile(backend='sparsify'): none of {len(records)} weights was packed ({'; '.join(reasons[:3])})",
            RuntimeWarning,
            stacklevel=2,
        )
    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **(options or {})}
    return compile_fx(lowered.graph_module, list(example_inputs), config_patches=patches or None)


def _parameters(module: fx.GraphModule, example_inputs: Sequence[Any] | None) -> dict[fx.Node, Tensor]:
    """Placeholders that are parameters, with their values."""
    if example_inputs is None:
        return {}
    values = placeholder_values(module, example_inputs)
    return {node: value.detach() for node, value in values.items() if isinstance(value, nn.Parameter)}


def _key(weight: Tensor) -> tuple[Any, ...]:
    return (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype)


def _dense(item: NotUnderstood, reason: str) -> Lowered:
    return Lowered(item.name, item.node.name, tuple(item.weight.shape), "dense", "as it was", reason)
