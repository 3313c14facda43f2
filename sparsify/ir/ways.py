"""Which way a model's own Python went while it was traced, where its inputs decide that.

A graph goes one way whatever it is given. What was asked of the inputs is kept beside it, and asked of every batch
before it runs: one that would take the model another way is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Way:
    """A line of a model's code, and what is true of the inputs where it goes as the graph does.

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
        """Whether the model goes this way on ``batch``."""
        with torch.no_grad():
            return bool(self.asked(*(batch[name].cpu() for name in self.inputs)))
