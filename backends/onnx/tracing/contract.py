"""What the exported graph takes and gives: a flat wrapper around a model, with names, examples and dynamic dimensions.

Decoders follow the names of optimum and onnxruntime-genai: ``input_ids``, ``attention_mask``, ``position_ids``,
``past_key_values.{i}.key/.value`` in; ``logits``, ``present.{i}.key/.value`` out. State-space models, and those with
layers of both kinds, are one step: ``past_conv.{i}``, ``past_recurrent.{i}`` in, ``present_…`` out. All else is a plain
graph of the model's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from torch import Tensor, nn

from sparsify.backends.onnx.tracing.wrappers import States

T = TypeVar("T")

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
GraphKind = Literal["decoder", "step", "uncached", "plain"]
Dims = dict[str, list[str | int]]


class Run(Protocol):
    """Calls a function where a module's parameters can be computed with."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


@dataclass(frozen=True)
class Contract:
    """A module to export, and how its inputs and outputs are called.

    Attributes:
        kind: ``decoder`` (key-value cache), ``step`` (recurrent states, one token at a time), ``uncached`` (a model
            that generates, of the whole text) or ``plain``.
        wrapper: takes a dictionary of tensors and a list of tuples of states; its ``model`` is the model.
        inputs, states: example tensors; ``dims`` names their dimensions and those of the outputs, ints being fixed.
        slots: names of the states, layer by layer, without the word for past or present: ``.0.key``, ``_conv.0``.
        outputs: names, in order.
        frozen: inputs of the model that the graph has not: it computes with the model's defaults for them.
        media: inputs of other kinds than text that the graph has not: it is the language model alone.
        fixed: inputs whose numbers decide its sizes: they are in the graph, which holds for them alone.
        one_row: why the model runs on one row alone; None where it runs on any number.
        one_length: why its sequences have the example's lengths; None where they have any.
    """

    kind: GraphKind
    wrapper: nn.Module
    inputs: dict[str, Tensor]
    states: States
    outputs: list[str]
    dims: Dims = field(default_factory=dict)
    slots: tuple[tuple[str, ...], ...] = ()
    frozen: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    fixed: dict[str, Tensor] = field(default_factory=dict)
    one_row: str | None = None
    one_length: str | None = None

    @property
    def input_names(self) -> list[str]:
        return [*self.inputs, *self.state_names("past")]

    @property
    def output_names(self) -> list[str]:
        return [*self.outputs, *self.state_names("present")]

    def state_names(self, when: Literal["past", "present"]) -> list[str]:
        keys = "past_key_values" if when == "past" else "present"
        return [f"{keys if slot.startswith('.') else when}{slot}" for slots in self.slots for slot in slots]
