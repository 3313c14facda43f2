"""Models that keep past tokens: the cache goes in and comes out beside the tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.backends.onnx.tracing.contract import BATCH, PAST, SEQUENCE, TOTAL, Contract, Dims, Run
from sparsify.backends.onnx.tracing.wrappers import CACHES, Decoder, RecurrentStep, cache_argument
from sparsify.errors import BackendError, first_line


def cached_contract(model: nn.Module, run: Run) -> Contract:
    """The contract of a model that generates.

    Raises:
        BackendError: its cache is of a kind that no exported graph can hold.
    """
    name = cache_argument(model)
    if name is None:
        raise _no_cache(model, f"its forward takes none of {', '.join(CACHES)}")
    recurrent = name == "cache_params" or (name == "cache" and _is_recurrent(getattr(model, "config", None)))
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


def _no_cache(model: nn.Module, found: str) -> BackendError:
    return BackendError(
        f"exporting {type(model).__name__} to ONNX as a decoder",
        found=found,
        do="Only key-value caches and caches of recurrent states can be inputs of the graph; use --to hf",
    )
