"""The calibration interpreter: a ``torch.fx.Interpreter`` that runs one region over all batches, then the next.

A weight is loaded when its region begins and freed when the region ends; values that do not depend on the batch are
computed once; between regions only live values are kept, in an :class:`ActivationStore`. So memory follows the
largest region and the store's budget, never the depth of the model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.analysis.flow import Flow, root_of
from sparsify.calibration.activations import ActivationStore
from sparsify.errors import CalibrationError, TraceError, first_line
from sparsify.host import is_out_of_memory, within_memory
from sparsify.ir.operators import exact_name, placed
from sparsify.ir.program import Program
from sparsify.runtime.cpu.wide import slow_dtypes, widened

Values = dict[fx.Node, Any]
# (batch, node, values of all nodes that are alive).
OnValue = Callable[[int, fx.Node, Mapping[fx.Node, Any]], None]


@dataclass(frozen=True)
class Region:
    """The nodes at positions [start, stop), and what becomes of their values.

    Attributes:
        end: the last position that will ever run: what only later nodes read is not kept.
        again: the region will be run again: live values are kept and nothing is stored for later.
        retain: live values are kept though no later node reads them, for a run backwards.
        wanted: compute only what these nodes need; None: everything.
    """

    start: int
    stop: int
    end: int
    again: bool = False
    retain: bool = False
    wanted: Collection[fx.Node] | None = None


@dataclass(frozen=True)
class Work:
    """A region made ready: what runs, what it begins with, what it leaves, and when a value is of no more use.

    ``copied``: values that it writes to, of which a region that runs twice needs a copy each time.
    """

    region: Region
    nodes: list[fx.Node]
    entering: list[fx.Node]
    leaving: list[fx.Node]
    dying: dict[fx.Node, list[fx.Node]]
    copied: set[fx.Node]


class Interpreter(fx.Interpreter):
    """Run regions of ``program`` over ``batches`` (input name to tensor), in order, from the first node on.

    All of it runs on ``device``: inputs, weights, constants and waiting values are brought there, and what an operator
    makes of nothing is made there. ``first`` is which of all batches the first of these is, as errors name them.

    Raises:
        CalibrationError: a batch has other numbers than the graph where these decide its shapes or its way.
    """

    def __init__(
        self,
        program: Program,
        flow: Flow,
        batches: Sequence[Mapping[str, Tensor]],
        store: ActivationStore,
        device: torch.device,
        *,
        first: int = 0,
    ) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        _check_numbers(program, batches, first)
        self.program, self.flow, self.batches, self.store, self.device = program, flow, batches, store, device
        self._placed = {node: placed(node, device) for node in flow.order}
        slow = slow_dtypes() if device.type == "cpu" else frozenset()
        self._widened = {
            node: way
            for node in flow.order
            if getattr(node.meta.get("val"), "dtype", None) in slow
            and (way := widened(exact_name(node), node.target)) is not None  # type: ignore[arg-type]
        }
        self.resident: Values = {}
        self.pinned: set[fx.Node] = set()

    def run_region(
        self,
        region: Region,
        *,
        watch: Collection[fx.Node] = (),
        on_value: OnValue | None = None,
        after_batch: Callable[[], None] | None = None,
    ) -> None:
        """Run ``region`` on every batch.

        Args:
            watch: nodes of interest; ``on_value`` is called for each as soon as it is computed, or at the beginning
                for one that was live already or that no batch changes.

        Raises:
            TraceError: an operator that fails. CalibrationError: too little memory.
        """
        with within_memory(f"running the model, {self._where(region)}", self.device):
            self.load_weights(region)
            for node in watch:
                if node not in self.flow.varying:
                    self.static(node)
            work = self.ready(region, watch)
            for index in range(len(self.batches)):
                self._run_batch(work, index, watch, on_value)
                if after_batch is not None:
                    after_batch()
        if not region.again:
            self._unload(region.stop)

    def _run_batch(self, work: Work, index: int, watch: Collection[fx.Node], on_value: OnValue | None) -> None:
        self.env = {**self.resident, **self.begin(work, index)}
        if on_value is not None:
            for node in watch:
                if node in self.env:
                    on_value(index, node, self.env)
        for node in work.nodes:
            self.env[node] = self.compute(node)
            if on_value is not None and node in watch:
                on_value(index, node, self.env)
            for dead in work.dying.get(node, ()):
                del self.env[dead]
        for node in work.leaving:
            self.store.put(index, node.name, self.env[node])
        self.env = {}

    def reads(self, region: Region) -> list[str]:
        """Names of the parameters that the region reads, in its order."""
        nodes = [n for n in self.flow.order[region.start : region.stop] if n in self.flow.varying]
        read = (self.flow.parameters.get(argument, frozenset()) for node in nodes for argument in node.all_input_nodes)
        return [name for names in read for name in sorted(names)]

    def _where(self, region: Region) -> str:
        """Which part of the model a region is, for people."""
        if names := self.reads(region):
            return f"{names[0]} to {names[-1]}"
        after = self.reads(Region(region.stop, len(self.flow.order), region.end))
        return f"before {after[0]}" if after else "its end"

    def ready(self, region: Region, watch: Collection[fx.Node] = (), *, twice: bool = False) -> Work:
        """What running ``region`` takes.

        Args:
            twice: whether it is run more than once on the same values.

        Raises:
            TraceError: it is, and writes in place to a value of which two views are alive.
        """
        flow, start, stop = self.flow, region.start, region.stop
        needed = flow.varying if region.wanted is None else flow.needs(start, stop, region.wanted)
        nodes = [n for n in flow.order[start:stop] if n in needed and n.op == "call_function"]
        entering = [n for n in flow.live(start, region.end) if n in watch or flow.read_within(n, start, stop)]
        leaving = [] if region.again else self._leaving(region, entering)
        copied = self._written_inside(entering, start, stop) if region.again or twice else set()
        return Work(region, nodes, entering, leaving, self._deaths(nodes, entering, leaving), copied)

    def _leaving(self, region: Region, entering: list[fx.Node]) -> list[fx.Node]:
        """What is read later of what the region makes, and of what it was given and writes to."""
        flow, start, stop = self.flow, region.start, region.stop
        written = {root for at, root in flow.mutations if start <= at < stop}
        changed = {node for node in entering if root_of(node) in written}
        return [n for n in flow.live(stop, region.end) if flow.position[n] >= start or n in changed]

    def begin(self, work: Work, index: int) -> Values:
        """The inputs of batch ``index`` and the live values that the region begins with."""
        batch, region = self.batches[index], work.region
        # Nobody waits for a copy to a GPU.
        values: Values = {
            node: batch[node.meta["input"]].to(self.device, non_blocking=True) for node in self.program.inputs
        }
        for node in work.entering:
            keep = region.again or region.retain or self.flow.read_within(node, region.stop, region.end)
            value = self.store.take(index, node.name, self.device, keep=keep)
            values[node] = value.clone() if node in work.copied and isinstance(value, Tensor) else value
        return values

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found: Any = self.map_nodes_to_values(self._placed[n], n)
        args, kwargs = found
        return args, kwargs

    def compute(self, node: fx.Node) -> Any:
        """The value of ``node`` from those in ``env``.

        Raises:
            TraceError: the operator fails; says which and where in the model it stands.
        """
        try:
            # What `run_node` does beside this is for tracers, and costs a GPU more than many an operator does.
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return self.call_function(self._widened.get(node, node.target), args, kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            raise TraceError(
                f"running {node.format_node()}",
                found=first_line(error),
                do=f"It comes from {node.meta.get('stack_trace', '').replace(chr(10), ' ') or 'the model'}",
            ) from error

    def load_weights(self, region: Region) -> None:
        """Make resident what the region needs and no batch changes."""
        flow, nodes = self.flow, self.flow.order[region.start : region.stop]
        self._constants(region)
        for node in nodes:
            if node in flow.varying and node.op == "call_function":
                for argument in node.all_input_nodes:
                    if argument not in flow.varying:
                        self.static(argument)

    def skip(self, region: Region) -> None:
        """What :meth:`run_region` leaves of ``region``, but for the values of batches, which somebody has."""
        self._constants(region)
        self._unload(region.stop)

    def _constants(self, region: Region) -> None:
        for node in self.flow.order[region.start : region.stop]:
            # In order, because some of these write in place (masks under construction).
            if node.op == "call_function" and node not in self.flow.varying:
                self.static(node)

    def static(self, node: fx.Node) -> Any:
        """The value of a node that does not depend on the batch, computed where it is not resident."""
        if node not in self.resident:
            if node.op == "get_attr":
                self.resident[node] = self.program.load(node).to(self.device)
            else:
                args, kwargs = fx.node.map_arg(self._placed[node], self.static)
                run: Any = self._widened.get(node, node.target)
                self.resident[node] = run(*args, **kwargs)
        return self.resident[node]

    def release(self, parameter: str, value: Tensor | None = None) -> None:
        """Forget what was computed from ``parameter``; with ``value``, go on with that instead."""
        for node in list(self.resident):
            if parameter in self.flow.parameters.get(node, ()):
                del self.resident[node]
        if value is not None:
            for node in self.flow.order:
                name = self.program.parameter(node)
                if name is not None and self.program.weights.canonical(name) == parameter:
                    self.resident[node] = value.to(dtype=node.meta["val"].dtype, device=self.device)

    def _deaths(
        self, nodes: list[fx.Node], entering: list[fx.Node], leaving: list[fx.Node]
    ) -> dict[fx.Node, list[fx.Node]]:
        """For each node that runs, the values that are of no more use in this region once it has run."""
        deaths: dict[fx.Node, list[fx.Node]] = {}
        kept = set(leaving)
        positions = [self.flow.position[node] for node in nodes]
        for value in (*entering, *nodes):
            if value in kept or not nodes:
                continue
            uses = [p for p in self.flow.uses[value] if p <= positions[-1]]
            last = max(uses, default=self.flow.position[value])
            # The last node to run at or before that use; a value that is held may outlive its last reader.
            at = bisect_left(positions, last)
            at = at if at < len(positions) and positions[at] == last else min(at, len(positions) - 1)
            deaths.setdefault(nodes[at], []).append(value)
        return deaths

    def _unload(self, stop: int) -> None:
        """Free what no node from position ``stop`` on reads, and weights."""
        for node in list(self.resident):
            ended = max(self.flow.uses[node], default=-1) < stop
            # A weight that is read again is loaded again: few are, and large ones (tied heads) far apart.
            if ended or (node.op == "get_attr" and node not in self.pinned):
                del self.resident[node]

    def _written_inside(self, entering: list[fx.Node], start: int, stop: int) -> set[fx.Node]:
        """Live values that the region writes to."""
        roots = {root for at, root in self.flow.mutations if start <= at < stop}
        copied = {node for node in entering if root_of(node) in roots}
        if len({root_of(node) for node in copied}) < len(copied):
            raise TraceError(
                f"running {next(iter(copied)).name} twice",
                found="an in-place operator writes to a value of which two views are alive",
                do="Use --schedule layer, which runs every node once",
            )
        return copied


def alive(runners: Mapping[str, Interpreter]) -> Iterator[tuple[tuple[str, int, str], object]]:
    """What later regions read, by runner, batch and node; tensors on the CPU."""
    for whose, runner in runners.items():
        for batch, name, value in runner.store.all_of():
            yield (whose, batch, name), value


def go_on(runners: Mapping[str, Interpreter], values: Iterable[tuple[Sequence[Any], object]]) -> None:
    """Have what was :func:`alive` in another run of the same programs, where that had come to."""
    for (whose, batch, name), value in values:
        runner = runners[whose]
        runner.store.put(batch, name, value.to(runner.device) if isinstance(value, Tensor) else value)


def _check_numbers(program: Program, batches: Sequence[Mapping[str, Tensor]], first: int) -> None:
    for index, batch in enumerate(batches, first):
        if (name := program.unlike(batch)) is not None:
            raise CalibrationError(
                f"input {name} of batch {index}",
                found=f"other numbers than the graph was traced with, {program.literals[name].tolist()}",
                do="They decide the shapes inside the model: give batches that have the same",
            )
        for way in program.ways:
            if not way.taken_by(batch):
                raise CalibrationError(
                    f"input {' and '.join(way.inputs)} of batch {index}",
                    found=f"numbers with which {program.model} goes another way than its graph, at {way.where}",
                    do="A graph goes one way: leave out batches that go another (with padding, with tokens marked), or "
                    "give the mask that the model makes of them as an input",
                )
