"""What the exported graph takes and gives: a flat wrapper around a model, with names, examples and dynamic dimensions.

Decoders follow the names of optimum and onnxruntime-genai: ``input_ids``, ``attention_mask``, ``position_ids``,
``past_key_values.{i}.key/.value`` in; ``logits``, ``present.{i}.key/.value`` out. State-space models are one step:
``past_conv.{i}``, ``past_recurrent.{i}`` in, ``present_…`` out. All else is a plain graph of the model's own inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsify.backends.onnx.tracing.wrappers import CACHES, Decoder, Plain, RecurrentStep, States, cache_argument
from sparsify.errors import BackendError, first_line

T = TypeVar("T")

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
GraphKind = Literal["decoder", "step", "plain"]
Dims = dict[str, list[str | int]]


class Run(Protocol):
    """Calls a function where a module's parameters can be computed with."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


@dataclass(frozen=True)
class Contract:
    """A module to export, and how its inputs and outputs are called.

    Attributes:
        kind: ``decoder`` (key-value cache), ``step`` (recurrent states, one token) or ``plain``.
        wrapper: takes a dictionary of tensors and a list of tuples of states; its ``model`` is the model.
        inputs, states: example tensors; ``dims`` names their dimensions and those of the outputs, ints being fixed.
        outputs: names, in order.
    """

    kind: GraphKind
    wrapper: nn.Module
    inputs: dict[str, Tensor]
    states: States
    outputs: list[str]
    dims: Dims = field(default_factory=dict)

    @property
    def input_names(self) -> list[str]:
        return [*self.inputs, *self.state_names("past")]

    @property
    def output_names(self) -> list[str]:
        return [*self.outputs, *self.state_names("present")]

    def state_names(self, when: Literal["past", "present"]) -> list[str]:
        if self.kind == "step":
            return [f"{when}_{part}.{i}" for i in range(len(self.states)) for part in ("conv", "recurrent")]
        stem = "past_key_values" if when == "past" else "present"
        return [f"{stem}.{i}.{part}" for i in range(len(self.states)) for part in ("key", "value")]


def contract_for(model: nn.Module, run: Run, batch: Mapping[str, Tensor]) -> Contract:
    """The contract for ``model``.

    Args:
        model: a module whose parameters take no memory.
        batch: example inputs of a plain model, name to tensor; digits name positional inputs.

    Raises:
        BackendError: the model generates, but its cache is of a kind that no exported graph can hold.
    """
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", bool)() and not getattr(config, "is_encoder_decoder", False)
    if not generates:
        return _plain(model, run, batch)
    name = cache_argument(model)
    if name is None:
        raise _no_cache(model, f"its forward takes none of {', '.join(CACHES)}")
    recurrent = name == "cache_params" or (name == "cache" and _is_recurrent(config))
    return _step(model, run) if recurrent else _decoder(model, run)


def _is_recurrent(config: Any) -> bool:
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    return bool(layers) and all(hasattr(layer, "recurrent_states") for layer in layers)


def _decoder(model: nn.Module, run: Run) -> Contract:
    from transformers import DynamicCache

    parameters = inspect.signature(model.forward).parameters
    wrapper = Decoder(model)
    # No dimension is 0 or 1, which tracing would take for a constant, and no two are alike.
    rows, length, past = 2, 3, 4
    ids = torch.zeros(rows, length, dtype=torch.long)
    try:
        _, cache = run(lambda: wrapper.run(DynamicCache(), {"input_ids": ids}))
        shapes = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
        dtype = cache.layers[0].keys.dtype
    except Exception as error:  # a model's own code raises whatever it likes
        raise _no_cache(model, f"it does not run with a plain key-value cache ({first_line(error)})") from error
    if any(len(shape) != 4 for pair in shapes for shape in pair):
        raise _no_cache(model, f"a layer's cache has shape {tuple(shapes[0][0])}")
    inputs = {"input_ids": ids}
    dims: Dims = {"input_ids": [BATCH, SEQUENCE], "logits": [BATCH, SEQUENCE, -1]}
    if "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones(rows, past + length, dtype=torch.long)
        # A mask of ones alone lets models drop it while they are traced.
        inputs["attention_mask"][0, 0] = 0
        dims["attention_mask"] = [BATCH, TOTAL]
    if "position_ids" in parameters:
        inputs["position_ids"] = torch.arange(past, past + length).expand(rows, length).clone()
        dims["position_ids"] = [BATCH, SEQUENCE]
    states = []
    for i, pair in enumerate(shapes):
        key, value = (torch.zeros(rows, s[1], past, s[3], dtype=dtype) for s in pair)
        states.append((key, value))
        for part, s in zip(("key", "value"), pair, strict=True):
            dims[f"past_key_values.{i}.{part}"] = [BATCH, int(s[1]), PAST, int(s[3])]
            dims[f"present.{i}.{part}"] = [BATCH, int(s[1]), TOTAL, int(s[3])]
    return Contract("decoder", wrapper, inputs, states, ["logits"], dims)


def _step(model: nn.Module, run: Run) -> Contract:
    rows = 2
    ids = torch.zeros(rows, 1, dtype=torch.long)
    wrapper = RecurrentStep(model)
    try:
        _, cache = run(lambda: wrapper.run(None, {"input_ids": ids}))
        pairs = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in cache.layers]
        states = [(_zeros_like(conv), _zeros_like(recurrent)) for conv, recurrent in pairs]
    except Exception as error:  # hybrid caches have layers of several kinds
        raise _no_cache(model, f"its cache is not one of recurrent states alone ({first_line(error)})") from error
    inputs = {"input_ids": ids, "attention_mask": torch.ones(rows, 1, dtype=torch.long)}
    dims: Dims = {"input_ids": [BATCH, 1], "attention_mask": [BATCH, 1], "logits": [BATCH, 1, -1]}
    for i, pair in enumerate(states):
        for part, state in zip(("conv", "recurrent"), pair, strict=True):
            dims[f"past_{part}.{i}"] = dims[f"present_{part}.{i}"] = [BATCH, *map(int, state.shape[1:])]
    return Contract("step", wrapper, inputs, states, ["logits"], dims)


def _zeros_like(state: Tensor) -> Tensor:
    return torch.zeros(state.shape, dtype=state.dtype)


def _plain(model: nn.Module, run: Run, batch: Mapping[str, Tensor]) -> Contract:
    positional = all(name.isdigit() for name in batch)
    rows = 2
    inputs: dict[str, Tensor] = {}
    dims: Dims = {}
    for name, value in batch.items():
        # Two rows whatever the batch had, and of tokens more than one.
        value = torch.zeros(rows, *value.shape[1:], dtype=value.dtype) if value.dim() else value
        named = f"input_{name}" if positional else name
        inputs[named] = value
        dims[named] = [BATCH, *map(int, value.shape[1:])]
        if value.dim() == 2 and not value.is_floating_point():
            inputs[named] = torch.zeros(rows, 7 if name.startswith("decoder") else 5, dtype=value.dtype)
            dims[named] = [BATCH, f"decoder_{SEQUENCE}" if name.startswith("decoder") else SEQUENCE]
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    if takes_mask and "input_ids" in inputs and "attention_mask" not in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, -1] = 0
        inputs["attention_mask"], dims["attention_mask"] = mask, [BATCH, SEQUENCE]
    wrapper = Plain(model, positional)
    try:
        outputs = run(lambda: wrapper.outputs(inputs))
    except Exception as error:
        raise BackendError(
            f"exporting {type(model).__name__} to ONNX",
            found=f"it does not run on {', '.join(f'{k} {list(v.shape)}' for k, v in inputs.items())} "
            f"({first_line(error)})",
            do="Give calibration batches with the inputs that the model needs",
        ) from error
    return Contract("plain", wrapper, inputs, [], list(outputs), dims)


def _no_cache(model: nn.Module, found: str) -> BackendError:
    return BackendError(
        f"exporting {type(model).__name__} to ONNX as a decoder",
        found=found,
        do="Only key-value caches and caches of recurrent states can be inputs of the graph; use --to hf",
    )
