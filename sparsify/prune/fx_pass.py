"""Weight passes as passes of ``torch.fx``, for other compilers' pipelines.

``GraphPrune(Wanda(NM(2, 4)), batches)`` is a ``PassBase``: it runs on any GraphModule in torch's own
``torch.fx.passes.infra.pass_manager.PassManager``, and inside a ``torch.compile`` backend. The module given is not
changed; the result holds new parameters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from sparsify.calibration.gradients import Samples
from sparsify.context import Context
from sparsify.data.batches import load_calibration
from sparsify.errors import CalibrationError, SpecError, TraceError
from sparsify.frontend.capture import capture
from sparsify.frontend.matching import weights_of_module
from sparsify.frontend.source import Source
from sparsify.host import cpu_by_default
from sparsify.ir.graph import placeholder_values, set_tensor
from sparsify.ir.store import MemoryStore
from sparsify.method.weight_pass import MatrixPass
from sparsify.prune.engine import prune
from sparsify.prune.names import Wanted
from sparsify.prune.targets import choose
from sparsify.words import Schedule


class GraphPrune(PassBase):
    """A weight pass bound to its calibration inputs.

    Args:
        calibration: batches for the graph's inputs: tensors, tuples of positional inputs, or keyword
            dictionaries. A pass that needs no data needs them only to know the shapes.
        example_inputs: what a ``torch.compile`` backend is given beside the graph: values of all its placeholders,
            among which those that are ``nn.Parameter`` are the weights.
        ignore: as for :func:`sparsify.compile`.
        only: as for :func:`sparsify.compile`.
        schedule: as for :func:`sparsify.compile`.
    """

    def __init__(
        self,
        weight_pass: MatrixPass,
        calibration: Sequence[Any] = (),
        *,
        example_inputs: Sequence[Any] | None = None,
        ignore: Sequence[str] = (),
        only: Sequence[str] = (),
        schedule: Schedule = "layer",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(weight_pass, MatrixPass):
            raise SpecError(
                f"GraphPrune of {weight_pass!r}",
                found="no pass that prunes or rounds weights",
                do='Give one: GraphPrune(Wanda(NM(2, 4)), …), or GraphPrune(parse_pass("wanda:2:4"), …)',
            )
        self.weight_pass, self.calibration, self.example_inputs = weight_pass, calibration, example_inputs
        self.ignore, self.only, self.schedule, self.device = ignore, only, schedule, device

    def __call__(self, graph_module: fx.GraphModule | torch.export.ExportedProgram) -> PassResult | None:
        if isinstance(graph_module, torch.export.ExportedProgram):
            graph_module = graph_module.module()
        return super().__call__(graph_module)

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not isinstance(graph_module, fx.GraphModule):
            raise TraceError(
                f"pass {self.weight_pass.name}",
                found=f"a {type(graph_module).__name__}",
                do="Give a torch.fx.GraphModule or an ExportedProgram; for a plain module use sparsify.compile",
            )

    @cpu_by_default()
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the pruned GraphModule.

        Raises:
            SparsifyError: as :func:`sparsify.compile`.
        """
        lifted, names = _hold_parameters(graph_module, self.example_inputs)
        source = Source("graph", lifted, weights_of_module(lifted))
        batches = self._batches(lifted, source)
        context = Context(self.device or torch.device("cpu"))
        program = capture(source, batches[0])
        given = program.weights
        targets, _ = choose(program, self.weight_pass.pattern, Wanted.of(given, self.only, self.ignore))
        program.weights = given.on(MemoryStore(given.store))
        data = Samples(batches) if self.weight_pass.needs_data else None
        done = prune(program, self.weight_pass, targets, data, context, schedule=self.schedule, dense=given)
        # Results are read on the CPU; each goes to where the parameter lay that it replaces.
        places = {name: t.device for name, t in (*lifted.named_parameters(), *lifted.named_buffers())}
        written = [name for site in done for name in site.written]
        pruned = {name: program.weights.read(name).to(places[name]) for name in written}
        return PassResult(_with_parameters(graph_module, pruned, names, program.weights.aliases), True)

    def _batches(self, lifted: fx.GraphModule, source: Source) -> list[dict[str, Tensor]]:
        given: Any = self.calibration
        if len(given) == 0 and self.example_inputs is not None:
            given = [tuple(v for v in self.example_inputs if not isinstance(v, nn.Parameter) and not _is_number(v))]
        if len(given) == 0:
            raise CalibrationError(
                f"pass {self.weight_pass.name} on a graph",
                found="no calibration batches",
                do="Give some: GraphPrune(Wanda(...), [batch, …]); they also tell the shapes",
            )
        inputs = [n for n in lifted.graph.nodes if n.op == "placeholder"]
        full = []
        for batch in given:
            values = batch if isinstance(batch, (tuple, list)) else [batch]
            if not isinstance(batch, dict) and len(values) > len(inputs):
                # All placeholders were given, weights among them.
                batch = tuple(v for v in values if not isinstance(v, nn.Parameter))
            full.append(batch)
        return load_calibration(full, source).batches


def _hold_parameters(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any] | None
) -> tuple[fx.GraphModule, dict[str, str]]:
    """A copy in which placeholders that are parameters became attributes; and attribute to placeholder name.

    Numbers that ``torch.compile`` leaves open are those of the example there: it is what calibration runs.
    """
    if example_inputs is None:
        return graph_module, {}
    values = placeholder_values(graph_module, example_inputs)
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    root = nn.Module()
    for name, value in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
        set_tensor(root, name, value)
    for name, child in graph_module.named_children():
        root.add_module(name, child)
    names = {}
    for node, value in values.items():
        if isinstance(value, nn.Parameter):
            attribute = readable(str(node.target))
            names[attribute] = node.name
            set_tensor(root, attribute, value)
            env[node] = graph.get_attr(attribute)
        elif _is_number(value) and isinstance(value, Tensor):
            set_tensor(root, node.name, value)
            env[node] = graph.get_attr(node.name)
        elif _is_number(value):
            env[node] = value.node.hint  # int(value) would hold the caller's graph to this size
        else:
            env[node] = graph.placeholder(str(node.target))
    for node in graph_module.graph.nodes:
        if node.target == "item" and _is_number(values.get(node.args[0])):
            env[node] = values[node.args[0]].item()
        elif node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph), names


def _is_number(value: Any) -> bool:
    """Whether it is a size, or a number that comes as a tensor without axes."""
    return isinstance(value, (torch.SymInt, torch.SymFloat)) or (isinstance(value, Tensor) and value.dim() == 0)


def _with_parameters(
    graph_module: fx.GraphModule, pruned: dict[str, Tensor], names: dict[str, str], aliases: dict[str, str]
) -> fx.GraphModule:
    shared = {id(t): t for t in (*graph_module.parameters(), *graph_module.buffers())}
    result = copy.deepcopy(graph_module, memo=dict(shared))
    nodes = {node.name: node for node in result.graph.nodes}
    for parameter, value in pruned.items():
        fresh = nn.Parameter(value, requires_grad=False)
        if parameter not in names:
            for name in (parameter, *(a for a, c in aliases.items() if c == parameter)):
                set_tensor(result, name, fresh)
            continue
        # The caller goes on passing the dense parameter; the graph reads ours instead.
        attribute = f"pruned_{names[parameter]}"
        result.register_parameter(attribute, fresh)
        placeholder = nodes[names[parameter]]
        last = [n for n in result.graph.nodes if n.op == "placeholder"][-1]
        with result.graph.inserting_after(last):
            reading = result.graph.get_attr(attribute)
        placeholder.replace_all_uses_with(reading)
    result.recompile()
    result.graph.lint()
    return result


def readable(placeholder: str) -> str:
    """``L_self_modules_layers_modules_0_parameters_weight_`` as ``layers.0.weight``."""
    name = re.sub(r"^[Ll]_(self|fn|module)_+", "", placeholder).strip("_")
    name = re.sub(r"(^|_)(modules|parameters)_+", ".", name).strip(".")
    return name or placeholder
