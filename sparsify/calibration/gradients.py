"""Gradients of the loss with respect to the weights, sample by sample, from the interpreter run backwards.

Forward, region by region, only the values at the cuts are kept; backward, from the last region to the first, each
region is computed again with its graph of derivatives, for one sample at a time. Memory holds one region's weights and
derivatives; activations at the cuts and the finished accumulators go to a file past the budget.

Of several processes each runs its own samples; :mod:`sparsify.calibration.sums` says what becomes of the sums.

Source of the statistics: GBLM-Pruner (2311.04902), section 3; algorithms.md, section 7.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import block_starts
from sparsify.calibration.activations import ActivationStore
from sparsify.calibration.interpreter import Interpreter, Region, Work
from sparsify.calibration.loss import check_loss, loss, loss_scale
from sparsify.calibration.sums import Gradients, Relay, Sums
from sparsify.context import Context, Progress
from sparsify.errors import CalibrationError
from sparsify.host import within_memory
from sparsify.ir.program import Program
from sparsify.precision import exact_products


@dataclass(frozen=True)
class Samples:
    """What gradients are taken on: batches of one sample each and, for each, what is predicted (None: see
    :func:`sparsify.calibration.loss.loss`)."""

    batches: Sequence[Mapping[str, Tensor]]
    labels: Sequence[Tensor] | None = None


@exact_products()
def measure_gradients(
    program: Program,
    parameters: Collection[str],
    data: Samples,
    wanted: Collection[str],
    into: Gradients,
    context: Context,
) -> None:
    """Measure, for each of ``parameters``, over samples s with gradients g_s of their loss:

    ``gradient_l1`` Σ|g_s|, ``gradient_l2`` √Σg_s², ``gradient`` Σg_s, and ``gradient_platon``, the product of the
    smoothed |g_s| and its smoothed deviation; in float32 and the parameter's own shape.

    Args:
        wanted: which of them.

    Raises:
        TraceError: a model without a loss.
        CalibrationError: a loss or a gradient that is not finite (the batch or weight is named), or zero everywhere.
    """
    logits = check_loss(program, data.labels is not None)
    world, flow = context.world, Flow.of(program)
    stop = flow.position[logits] + 1
    cuts = [0, *block_starts(program, flow), stop]
    # Live values are kept though nothing later reads them: the way back does.
    regions = [Region(start, end, stop, retain=True) for start, end in itertools.pairwise(cuts)]
    device = context.device
    with ActivationStore(context.memory, device) as store, ActivationStore(context.memory // 4, device) as backward:
        runner = _Backward(program, flow, data, store, context, backward, logits)

        def tell(done: float, what: str) -> None:
            context.observe(Progress("gradients", done, 2 * len(regions), what))

        with torch.no_grad():
            for number, region in enumerate(regions):
                runner.run_region(region, after_batch=partial(tell, number, "forward"))
                runner.resident.clear()
        read = [runner.parameters(region) & set(parameters) for region in regions]
        sums: dict[str, Sums] = {}
        relay = Relay(world, device, program.weights.shape, wanted)
        shared = _Shared(backward, device, set(wanted))
        for number, region in enumerate(reversed(regions)):
            own = read.pop()
            # A weight that several regions read (embeddings tied to the head) waits for the first of them.
            later = own & set[str]().union(*read)
            sums |= {p: Sums(wanted) for p in own - sums.keys()}
            of = ", ".join(sorted(own)[:2]) or "a region"
            world.says(f"gradients of {of}")
            with within_memory(f"gradients of {of}", device):
                relay.take(sums, own)
                for index in range(len(runner.batches)):
                    found = dict(runner.backward(region, index, own))
                    for parameter in own:
                        gradient = shared.whole(parameter, index, found.get(parameter), last=parameter not in later)
                        if gradient is not None:
                            sums[parameter].add(gradient)
                    tell(len(regions) + number + (index + 1) / len(runner.batches), "backward")
                runner.check_losses()
                relay.hand_on(sums, own, later)
                for parameter in (own - later) & sums.keys():
                    into.keep(parameter, sums.pop(parameter).finished(parameter))
            runner.resident.clear()
        relay.tell(into)


def _repeatable(device: torch.device) -> AbstractContextManager[object]:
    """Attention by plain products on a GPU: its faster kernels add derivatives up in another order at every run."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


class _Shared:
    """What regions give to the gradient of a weight that several of them read, until all have given theirs.

    A sum over samples may be taken piece by piece; the size of a sample's gradient is known once it is whole.
    """

    def __init__(self, store: ActivationStore, device: torch.device, wanted: Collection[str]) -> None:
        self.store, self.device, self.piecewise = store, device, set(wanted) == {"gradient"}
        self._waiting: set[tuple[int, str]] = set()

    def whole(self, parameter: str, index: int, gradient: Tensor | None, *, last: bool) -> Tensor | None:
        """What can be added to the statistics of ``parameter`` of sample ``index`` now that a region gave ``gradient``
        (None: nothing), the ``last`` or not."""
        key = (index, f"gradient of {parameter}")
        if key in self._waiting:
            self._waiting.discard(key)
            before = self.store.take(*key, self.device)
            assert isinstance(before, Tensor)
            gradient = before if gradient is None else before + gradient
        if last or self.piecewise or gradient is None:
            return gradient
        self._waiting.add(key)
        self.store.put(*key, gradient)
        return None


class _Backward(Interpreter):
    """An interpreter that can also run one region backwards for one batch."""

    def __init__(
        self,
        program: Program,
        flow: Flow,
        data: Samples,
        store: ActivationStore,
        context: Context,
        gradients: ActivationStore,
        logits: fx.Node,
    ) -> None:
        self.first, stop = context.world.bounds(len(data.batches))
        own = context.world.share(data.batches, "calibration batches")
        super().__init__(program, flow, own, store, context.device, first=self.first)
        self.labels = None if data.labels is None else data.labels[self.first : stop]
        self.gradients, self.logits = gradients, logits
        self._known: set[tuple[int, str]] = set()
        # Of each batch that has run backwards, whether its loss is a number.
        self.finite: list[Tensor] = []

    def check_losses(self) -> None:
        """Once a region: a GPU that is asked after every batch stands still meanwhile.

        Raises:
            CalibrationError: names the batch whose loss is no number.
        """
        found = torch.stack(self.finite).tolist() if self.finite else []
        self.finite.clear()
        if not all(found):
            raise CalibrationError(
                f"the loss of calibration batch {self.first + found.index(False)}",
                found="NaN or infinity",
                do="Look at the weights and the labels; where float16 overflows take --compute-dtype float32",
            )

    def parameters(self, region: Region) -> set[str]:
        """Names of the parameters that the region reads."""
        return set(self.reads(region))

    def backward(self, region: Region, index: int, own: Collection[str]) -> list[tuple[str, Tensor]]:
        """Gradients of the loss of batch ``index`` for the parameters ``own``, each in float32.

        What flows to the regions before is left in the store of gradients.
        """
        with torch.enable_grad(), _repeatable(self.device):
            leaves = self._leaves(own)
            self.load_weights(region)
            work = self.ready(region, twice=True)
            values = self.begin(work, index)
            inputs: dict[fx.Node, Tensor] = {}
            for node in work.entering:
                value = values[node]
                if isinstance(value, Tensor) and value.is_floating_point():
                    inputs[node] = leaf = value.detach().requires_grad_()
                    values[node] = leaf.clone() if node in work.copied else leaf
            self.env = {**self.resident, **values}
            for node in work.nodes:
                self.env[node] = self.compute(node)
            outputs, arriving = self._arriving(work, index)
            scale = loss_scale(self.logits.meta["val"].dtype)
            if self.logits in self.env:
                label = None if self.labels is None else self.labels[index]
                own_loss = loss(self.program, self.env[self.logits], self.batches[index], label)
                self.finite.append(own_loss.detach().isfinite())
                outputs.append(scale * own_loss)
                arriving.append(None)
            self.env = {}
            wanted = [*leaves.values(), *inputs.values()]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if outputs and wanted:
                # The transposes of a weight are computed once for all batches: their derivatives must stay.
                found = torch.autograd.grad(outputs, wanted, arriving, allow_unused=True, retain_graph=True)
        for node, gradient in zip(inputs, found[len(leaves) :], strict=True):
            if gradient is not None:
                self._pass_back(index, node, gradient)
        pairs = zip(leaves, found[: len(leaves)], strict=True)
        return [(name, gradient.float() / scale) for name, gradient in pairs if gradient is not None]

    def _leaves(self, own: Collection[str]) -> dict[str, Tensor]:
        """The parameters of a region as leaves of the graph of derivatives; all that is computed from them follows."""
        leaves: dict[str, Tensor] = {}
        for node in self.flow.order:
            name = self.program.parameter(node)
            canonical = self.program.weights.canonical(name) if name is not None else None
            if canonical not in own or canonical is None:
                continue
            if node not in self.resident:
                self.resident[node] = leaves.get(
                    canonical, self.program.load(node).to(self.device).detach()
                ).requires_grad_()
            leaves[canonical] = self.resident[node]
        return leaves

    def _arriving(self, work: Work, index: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Values that leave the region and whose gradients are known, with those."""
        outputs: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for node in work.leaving:
            key = (index, node.name)
            if key not in self._known:
                continue
            gradient = self.gradients.take(index, node.name, self.device)
            self._known.discard(key)
            value = self.env[node]
            if isinstance(value, Tensor) and value.requires_grad and isinstance(gradient, Tensor):
                outputs.append(value)
                gradients.append(gradient)
        return outputs, gradients

    def _pass_back(self, index: int, node: fx.Node, gradient: Tensor) -> None:
        key = (index, node.name)
        if key in self._known:
            before = self.gradients.take(index, node.name, self.device)
            assert isinstance(before, Tensor)
            gradient = before + gradient
        self._known.add(key)
        self.gradients.put(index, node.name, gradient)
