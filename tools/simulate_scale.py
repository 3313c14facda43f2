"""What a pruning run costs by many processes, from a model's config.json alone: no weight is read, nothing is run.

    python tools/simulate_scale.py FOLDER [--pass wanda:2:4] [--samples 128] [--length 2048] [--ranks 1 8 64]
        [--disk 5e9] [--link 50e9] [--flops 400e12] [--memory 1.5e12] [--batch 1] [--regions]
    python tools/simulate_scale.py --check [--layers 2] [--samples 16]

FOLDER holds a config.json. The model is traced without memory for its weights, cut where the engine cuts it, and summed
up region by region: bytes read, products of its forward and of its statistics, solves, activations that live between
regions, statistics, bytes of weights made anew in memory, and bytes sent as the engine counts them. Seconds are those
of reading, computing, moving and sending one after the other, at the rates given: bytes per second of a machine's disk,
of a process's link and of its memory, operations per second of a process. Processes of one machine read a region at
the same time: the disk reads it once, and the others have it of the page cache. --check prunes a small Llama by one and
by two processes, takes the rate from the first, and holds what was foreseen of the second against what it did.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from sparsify.analysis.flow import Flow
from sparsify.analysis.linear import InputGroup, LinearSite
from sparsify.calibration.accumulators import Gram
from sparsify.calibration.measuring import Measuring, Step
from sparsify.calibration.recorder import OutputSketch
from sparsify.context import Context
from sparsify.errors import SparsifyError
from sparsify.frontend.capture import capture
from sparsify.frontend.skeleton import build_skeleton
from sparsify.frontend.source import open_source
from sparsify.ir.program import Program
from sparsify.method.pattern import NM, Grid, Pattern, Unstructured
from sparsify.method.spec import parse_pass
from sparsify.method.weight_pass import MatrixPass
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose

_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.linear, _ATEN.matmul, _ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm, _ATEN.einsum, _ATEN.convolution,
    _ATEN.conv1d, _ATEN.conv2d, _ATEN.scaled_dot_product_attention, _ATEN._grouped_mm,
}  # fmt: skip
# What one process of several keeps apart for each batch, and what all add up.
VECTORS, MATRICES = {"squared_norm", "absolute_sum", "sum"}, {"gram"}
# How often the bytes of a weight are made anew in memory: where its mask is chosen, looked at and packed, by whom it is
# pruned; where it is read, copied, unpacked, stored and its error measured, by every process.
CHOSEN, HELD = 4, 7
# How much longer than a product's an operation of a factor and of a sweep takes: measured, a matrix of 2816 on a core.
FACTORED, SWEPT = 1.75, 3.0
# Seconds that a sweep takes for each column besides, there.
COLUMN = 8e-5
KNOWN = ("wanda", "sparsegpt")


@dataclass
class Costs:
    """Of one process in one region. ``sent``: of all processes together, as the engine counts it."""

    read: float = 0.0
    forward: float = 0.0
    measured: float = 0.0
    solved: float = 0.0
    moved: float = 0.0
    columns: float = 0.0
    activations: float = 0.0
    statistics: float = 0.0
    sent: float = 0.0

    def seconds(self, rates: Rates, ranks: int) -> float:
        computed = (self.forward + self.measured + self.solved) / rates.flops
        besides = self.moved / rates.memory + self.columns * rates.column
        return self.read / rates.disk + computed + besides + self.sent / ranks / rates.link


@dataclass(frozen=True)
class Rates:
    disk: float
    link: float
    flops: float
    memory: float
    column: float = 0.0


class Model:
    """A model that has no weights, and what a pass would do to it.

    Raises:
        ValueError: a pass that no costs are known of.
    """

    def __init__(self, folder: Path, spec: str, length: int, batch: int) -> None:
        own = parse_pass(spec)
        if not isinstance(own, MatrixPass) or own.name not in KNOWN or not set(own.statistics) <= VECTORS | MATRICES:
            raise ValueError(f"{spec}: costs are known of {' and '.join(KNOWN)}")
        self.own: MatrixPass = own
        source = open_source(build_skeleton(folder))
        ids = torch.zeros(batch, length, dtype=torch.long)
        self.program: Program = capture(source, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        self.flow = Flow.of(self.program)
        targets, _ = choose(self.program, own.pattern, Wanted.of(source.weights, (), ()))
        sites = [site for target in targets for site in target.sites]
        self.measuring = Measuring(self.program, sites, [self.program.zero_batch()], own.statistics, Context())

    def regions(self, ranks: int, batches: int) -> list[tuple[Step, Costs]]:
        """The costs of each region, of the process that has most."""
        own, found, start = math.ceil(batches / ranks), list[tuple[Step, Costs]](), 0
        for step in self.measuring.steps:
            costs = Costs()
            nodes = self.flow.order[start : step.start]
            costs.forward = own * sum(map(products_of, nodes))
            costs.read = sum(bytes_of(n) for n in nodes_read(self.program, nodes))
            costs.activations = own * self._living(step.start)
            for group in step.groups:
                self._measure(costs, group, own, ranks)
                for number, site in enumerate(group.sites):
                    self._solve(costs, site, ranks, first=number == 0)
            found.append((step, costs))
            start = step.start
        return found

    def _living(self, cut: int) -> float:
        made = (n for n in self.flow.order[:cut] if n in self.flow.varying and max(self.flow.uses[n], default=0) >= cut)
        return sum(bytes_of(node) for node in made)

    def _measure(self, costs: Costs, group: InputGroup, own: int, ranks: int) -> None:
        site = group.sites[0]
        columns, rows = site.shape[1], own * shape_and_size(site.activation)[0].numel() / site.shape[1]
        for name in self.own.statistics:
            if name in VECTORS:
                costs.measured += 2 * rows * columns
                # float64, and what each batch adds beside it.
                costs.statistics += site.experts * columns * (8 + (4 * own if ranks > 1 else 0))
                costs.sent += ranks * (ranks - 1) * own * site.experts * columns * 4
            else:
                costs.measured += 2 * rows * columns**2 * 5 / 8
                costs.statistics += 4 * site.experts * columns**2
                # In a ring, what is computed of it alone; of experts that are dealt out to whom it belongs.
                ways = 1 if site.experts >= ranks > 1 else 2
                costs.sent += ways * (ranks - 1) * 4 * site.experts * summed_of(columns)

    def _solve(self, costs: Costs, site: LinearSite, ranks: int, *, first: bool) -> None:
        rows, columns = site.shape
        numbers, by_experts = site.experts * rows * columns, site.experts >= ranks
        if ranks > 1:
            # Gathered, each its part, or given by one to all: every byte goes to all others once. A bit of each number
            # says whether it is zero; where kept weights move they are sent too.
            size = shape_and_size(self.program.parameter_nodes()[site.parameter])[1]
            kept = 0.0 if self.own.keeps_weights else kept_of(self.own.pattern) * size
            costs.sent += (ranks - 1) * numbers * min(1 / 8 + kept, size)
        share = 1 / ranks if by_experts or self.own.by_rows else 1.0
        # Each process measures errors on a sketch of its own rows: two products with the whole weight.
        sketch = max(OutputSketch.SIZE // site.experts, OutputSketch.LEAST)
        costs.solved += 4 * sketch * numbers
        stored = numbers * shape_and_size(self.program.parameter_nodes()[site.parameter])[1]
        costs.moved += stored * (CHOSEN * share + HELD)
        if "gram" not in self.own.statistics:
            costs.solved += 10 * numbers * share
            return
        # A Cholesky factor, the inverse by it and the factor of that: of what sites share, once. Each process factors
        # for itself what is divided by rows.
        factors = 4 / 3 * columns**3 * site.experts if first else 0.0
        costs.solved += FACTORED * factors * (1 / ranks if by_experts else 1.0) + SWEPT * numbers * columns * share
        costs.columns += columns * site.experts * (1 / ranks if by_experts else 1.0)


def products_of(node: fx.Node) -> float:
    """Operations of one node's products, as torch counts them."""
    if node.op != "call_function" or getattr(node.target, "overloadpacket", None) not in PRODUCTS:
        return 0.0
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), like)
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return float(counter.get_total_flops())


def like(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def summed_of(columns: int) -> int:
    """Numbers of a Gram matrix that are computed: its blocks on and above the diagonal."""
    size = max(Gram.LEAST, -(-columns // Gram.BLOCKS))
    return sum(min(size, columns - start) * (columns - start) for start in range(0, columns, size))


def kept_of(pattern: Pattern | Grid) -> float:
    """Which share of a weight is not zero."""
    if isinstance(pattern, NM):
        return pattern.n / pattern.m
    return 1 - float(pattern.sparsity) if isinstance(pattern, Unstructured) else 1.0


def nodes_read(program: Program, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    return {n for node in nodes for n in node.all_input_nodes if program.parameter(n) is not None}


def shape_and_size(node: fx.Node) -> tuple[torch.Size, int]:
    value = node.meta["val"]
    return value.shape, value.element_size()


def bytes_of(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def table(model: Model, ranks: Sequence[int], batches: int, rates: Rates, each: bool) -> None:
    named = ("read", "forward", "measured", "solved", "moved", "activations", "statistics", "sent")
    print(" ".join(f"{word:>12}" for word in ("processes", *named, "seconds")))
    for count in ranks:
        found = model.regions(count, batches)
        if each:
            for step, costs in found:
                line(step.label, costs, named, costs.seconds(rates, count))
        line(str(count), total(found), named, sum(costs.seconds(rates, count) for _, costs in found))


def line(first: str, costs: Costs, named: Sequence[str], seconds: float) -> None:
    print(f"{first:>12} " + " ".join(f"{getattr(costs, name):12.3g}" for name in named) + f" {seconds:12.4g}")


def total(found: Sequence[tuple[Step, Costs]]) -> Costs:
    """All regions together: memory is that of the largest."""
    made = Costs()
    for name in (field.name for field in fields(Costs)):
        values = [getattr(costs, name) for _, costs in found]
        setattr(made, name, max(values) if name in ("activations", "statistics") else sum(values))
    return made


def check(layers: int, samples: int, length: int) -> bool:
    """Whether what is foreseen of two processes is within a quarter of what they do; it is printed."""
    from bench_processes import make, run

    right, memory = True, made_anew()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place / "model", layers, "float32")
        for number, spec in enumerate(("wanda:2:4", "sparsegpt:2:4")):
            one, two = (run(place / "model", spec, n, place / f"{number}-{n}", samples, length) for n in (1, 2))
            rows = max(1, 2048 // length)
            model, batches = Model(place / "model", spec, length, rows), -(-samples // rows)
            alone, both = total(model.regions(1, batches)), total(model.regions(2, batches))
            print(f"{spec}: {one['pass']:.4g} s by one process, memory made anew at {memory / 1e9:.2g} GB/s")
            besides = alone.moved / memory + alone.columns * COLUMN
            speed = (alone.forward + alone.measured + alone.solved) / (one["pass"] - besides)
            rates = Rates(math.inf, math.inf, speed, memory, COLUMN)
            for what, foreseen, was in (
                ("bytes sent", both.sent, two["sent"]),
                ("seconds of the pass", both.seconds(rates, 2), two["pass"]),
            ):
                print(f"{spec}, {what}: foreseen {foreseen:.4g}, was {was:.4g} ({foreseen / was:.2f}x)")
                right &= 0.75 <= foreseen / was <= 1.25
    return right


def made_anew(size: int = 1 << 24) -> float:
    """Bytes a second that this machine copies into memory that is new, as most of what a pass makes is."""
    value, started = torch.randn(size), time.process_time()
    for _ in range(8):
        value.clone()
    return 8 * value.nbytes / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--pass", dest="spec", default="wanda:2:4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--disk", type=float, default=5e9)
    parser.add_argument("--link", type=float, default=50e9)
    parser.add_argument("--flops", type=float, default=400e12)
    parser.add_argument("--memory", type=float, default=1.5e12)
    parser.add_argument("--column", type=float, default=0.0, help="seconds of a sweep for each column")
    parser.add_argument("--batch", type=int, default=1, help="sequences that run at once")
    parser.add_argument("--regions", action="store_true", help="each region too")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    asked = parser.parse_args()
    if asked.check:
        sys.exit(not check(asked.layers, min(asked.samples, 16), asked.length or 512))
    if asked.folder is None:
        parser.error("FOLDER, or --check")
    started = time.perf_counter()
    try:
        model = Model(asked.folder, asked.spec, asked.length or 2048, asked.batch)
    except (SparsifyError, ValueError) as error:
        parser.error(str(error))
    print(
        f"{asked.folder.name}, {asked.spec}: {len(model.measuring.steps)} regions, traced in "
        f"{time.perf_counter() - started:.0f} s; bytes, operations, seconds"
    )
    rates = Rates(asked.disk, asked.link, asked.flops, asked.memory, asked.column)
    table(model, asked.ranks, -(-asked.samples // asked.batch), rates, asked.regions)


if __name__ == "__main__":
    main()
