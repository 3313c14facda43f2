"""A captured model: one flat FX graph whose parameters live elsewhere.

The graph has one ``placeholder`` per input tensor and one ``get_attr`` per parameter, buffer or constant, named as in
the model. Parameters are on the meta device in the graph module; their values come from :class:`Weights` when needed.
``node.meta["val"]`` is a meta tensor with the shape and dtype of the node's value. A program is for no device: it names
the CPU where it must name one, and who runs it says where (:func:`sparsify.ir.operators.placed`).
:mod:`sparsify.ir.rules` says in full what is true of a program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from sparsify.errors import VerifyError
from sparsify.ir.rules import broken_rules
from sparsify.ir.weights import Weights

T = TypeVar("T")


@dataclass(frozen=True)
class Way:
    """A line of a model's own Python that decides by its inputs which way it goes, and when it goes as the graph does.

    A graph goes one way whatever it is given: what is asked of the inputs is kept beside it, and asked of every batch
    before it runs.

    Attributes:
        where: a file, a line and what it says. asked: takes the inputs that it has placeholders for, on the CPU, and
            gives one truth value.
    """

    where: str
    asked: fx.GraphModule

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs that decide."""
        return [str(node.meta["input"]) for node in self.asked.graph.nodes if node.op == "placeholder"]

    def taken_by(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether the model goes as the graph does on ``batch``."""
        with torch.no_grad():
            return bool(self.asked(*(batch[name].cpu().clone() for name in self.inputs)))


@dataclass
class Program:
    """What every analysis, pass and backend works on.

    Attributes:
        graph_module: the graph; parameters are meta tensors in it.
        weights: values of the parameters and of buffers that the checkpoint holds.
        constants: values of all other ``get_attr`` targets (rotary frequencies, literal tensors).
        output_names: names of the flat outputs where the model gives them, else "0", "1", ….
        model: the class of the model that was captured; empty for a bare graph.
        literals: inputs whose numbers are in the graph, because they decide its shapes; other numbers need another.
        ways: what else is true of a batch on which the model goes the way that the graph goes.
    """

    graph_module: fx.GraphModule
    weights: Weights
    constants: dict[str, Tensor]
    output_names: list[str] = field(default_factory=list)
    model: str = ""
    literals: dict[str, Tensor] = field(default_factory=dict)
    ways: tuple[Way, ...] = ()
    _facts: dict[Callable[[Any], Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def fact(self, analysis: Callable[[Program], T]) -> T:
        """``analysis(self)``, done once for this graph; what it gives is shared and must not be changed."""
        if analysis not in self._facts:
            self._facts[analysis] = analysis(self)
        found: T = self._facts[analysis]
        return found

    def changed(self) -> None:
        """Say that the graph was edited: facts are found anew from here on."""
        self._facts.clear()
        self.graph_module.recompile()

    def parameter(self, node: fx.Node) -> str | None:
        """The parameter or buffer that a ``get_attr`` node reads, or None for any other node."""
        if node.op == "get_attr" and node.target not in self.constants:
            return str(node.target)
        return None

    def parameter_nodes(self) -> dict[str, fx.Node]:
        """The first node that reads each parameter, by the parameter's canonical name."""
        found: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if (name := self.parameter(node)) is not None:
                found.setdefault(self.weights.canonical(name), node)
        return found

    def unlike(self, batch: Mapping[str, Tensor]) -> str | None:
        """The first of :attr:`literals` for which ``batch`` has other numbers than the graph, or none."""
        names = (n for n, v in self.literals.items() if n not in batch or not torch.equal(batch[n].cpu(), v))
        return next(names, None)

    def zero_batch(self) -> dict[str, Tensor]:
        """A batch with nothing in it, of the shapes and dtypes that the model was captured with."""
        return {n.meta["input"]: torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in self.inputs}

    def load(self, node: fx.Node) -> Tensor:
        """The value of a ``get_attr`` node, in the dtype that the graph computes with."""
        target = str(node.target)
        if target in self.constants:
            return self.constants[target]
        return self.weights.read(target).to(node.meta["val"].dtype)

    def verify(self) -> None:
        """Check every rule that a program obeys.

        Raises:
            VerifyError: names the rule that is broken, and where.
        """
        for rule, where in broken_rules(self):
            raise VerifyError(f"the graph at {where}", found=f"broken: {rule.sentence}", do="Report this as a bug")
