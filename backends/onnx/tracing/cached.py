"""Models that keep past tokens: the cache goes in and comes out beside the tokens."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from sparsify.backends.onnx.tracing.contract import BATCH, PAST, SEQUENCE, TOTAL, Contract, Dims, Run
from sparsify.backends.onnx.tracing.layers import cache_of, described, kept, layers_of, recurrent, strange
from sparsify.backends.onnx.tracing.layers import slots as layer_slots
from sparsify.backends.onnx.tracing.wrappers import Decoder, States, Step, cache_argument
from sparsify.errors import BackendError, first_line

# What the code of these does with a cache or with positions, and the graph that it is traced to would not.
_OTHERWISE = {
    "git": "it takes the first places of its cache for an image's, which is not in the graph",
    "moshi": "its cache forgets what is further back than sliding_window, and its mask does not",
    "kosmos-2": "it counts positions from its padding token's number on, past padding",
    "kosmos-2.5": "it counts positions from its padding token's number on, past padding",
}


def cached_contract(model: nn.Module, run: Run) -> Contract:
    """The contract of a model that generates.

    Raises:
        BackendError: its cache is of a kind that no exported graph can hold.
    """
    name = cache_argument(model)
    if name is None:
        raise _no_cache(model, "its forward takes no cache of keys and values, and none of recurrent states")
    config = getattr(model, "config", None)
    if why := _OTHERWISE.get(getattr(config, "model_type", "")):
        raise _no_cache(model, why)
    if any(".generation_" in getattr(getattr(type(model), n, None), "__module__", "") for n in ("generate", "_sample")):
        raise _no_cache(model, "it generates by a loop of its own, whose steps are more than one token")
    layers = layers_of(config)
    if strange(layers):
        raise _no_cache(model, f"its layers keep {described(config, layers)}")
    return _step(model, run) if any(recurrent(layer) for layer in layers) else _decoder(model, run)


def _decoder(model: nn.Module, run: Run) -> Contract:
    from transformers import DynamicCache

    parameters = inspect.signature(model.forward).parameters
    wrapper = Decoder(model)
    # No dimension is 0 or 1, which tracing would take for a constant, and no two are alike.
    rows, length, past = 2, 3, 4
    ids = torch.zeros(rows, length, dtype=torch.long)
    try:
        _, cache = run(lambda: wrapper.run(DynamicCache(), {"input_ids": ids}))
        found = [(layer.keys, layer.values) for layer in cache.layers]
    except Exception as error:  # a model's own code raises whatever it likes
        raise _not_run(model, error) from error
    if empty := [i for i, pair in enumerate(found) if any(tensor is None for tensor in pair)]:
        said = ", ".join(map(str, empty[:4])) + (f" and {len(empty) - 4} more" if len(empty) > 4 else "")
        raise _no_cache(model, f"text alone gives layers {said} no keys and values (they attend to other inputs)")
    if not found:
        raise _no_cache(model, "its layers keep nothing of what was read")
    if odd := [tuple(tensor.shape) for pair in found for tensor in pair if tensor.dim() != 4]:
        raise _no_cache(model, f"a layer's cache has shape {odd[0]}")
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
    slots = tuple((f".{i}.key", f".{i}.value") for i in range(len(found)))
    states: States = []
    for names, pair in zip(slots, found, strict=True):
        states.append(tuple(torch.zeros(rows, t.shape[1], past, t.shape[3], dtype=t.dtype) for t in pair))
        for name, tensor in zip(names, pair, strict=True):
            _name_dims(dims, name, tensor)
    return Contract("decoder", wrapper, inputs, states, ["logits"], dims, slots)


def _step(model: nn.Module, run: Run) -> Contract:
    rows, past = 2, 4
    ids = torch.zeros(rows, 1, dtype=torch.long)
    config = getattr(model, "config", None)
    positions = "position_ids" in inspect.signature(model.forward).parameters
    first = {"input_ids": ids, **({"position_ids": torch.zeros_like(ids)} if positions else {})}
    # Tells what each layer keeps, and of which sizes.
    try:
        _, cache = run(lambda: Step(model, ()).run(cache_of(config), first))
        slots = tuple(layer_slots(layer, number) for number, layer in enumerate(cache.layers))
        found = [kept(layer) for layer in cache.layers]
    except Exception as error:  # a model's own code raises whatever it likes
        raise _not_run(model, error) from error
    for names, tensors in zip(slots, found, strict=True):
        if odd := [t for n, t in zip(names, tensors, strict=True) if n.startswith(".") and t.dim() != 4]:
            raise _no_cache(model, f"a layer's cache has shape {tuple(odd[0].shape)}")
    if not any(slots):
        raise _no_cache(model, "its layers keep nothing of what was read")
    keyed = any(slot.endswith(".key") for names in slots for slot in names)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(rows, past + 1 if keyed else 1, dtype=torch.long)}
    dims: Dims = {"input_ids": [BATCH, 1], "attention_mask": [BATCH, TOTAL if keyed else 1], "logits": [BATCH, 1, -1]}
    if keyed:
        inputs["attention_mask"][0, 0] = 0
        if positions:
            inputs["position_ids"], dims["position_ids"] = torch.full((rows, 1), past), [BATCH, 1]
    states: States = []
    for names, tensors in zip(slots, found, strict=True):
        states.append(tuple(_example(name, tensor, past) for name, tensor in zip(names, tensors, strict=True)))
        for name, tensor in zip(names, tensors, strict=True):
            _name_dims(dims, name, tensor)
    return Contract("step", Step(model, slots), inputs, states, ["logits"], dims, slots)


def _example(slot: str, state: Tensor, past: int) -> Tensor:
    """Zeros of the state's shape, of keys and values so many tokens long."""
    shape = [*state.shape]
    if slot.startswith("."):
        shape[-2] = past
    return torch.zeros(shape, dtype=state.dtype)


def _name_dims(dims: Dims, slot: str, state: Tensor) -> None:
    sizes = [int(size) for size in state.shape[1:]]
    if slot.startswith("."):
        heads, _, width = sizes
        dims[f"past_key_values{slot}"] = [BATCH, heads, PAST, width]
        dims[f"present{slot}"] = [BATCH, heads, TOTAL, width]
    else:
        dims[f"past{slot}"] = dims[f"present{slot}"] = [BATCH, *sizes]


def _not_run(model: nn.Module, error: Exception) -> BackendError:
    config = getattr(model, "config", None)
    kept = described(config, layers_of(config)) or "nothing that its config names"
    return _no_cache(model, f"its layers keep {kept}, and it does not run with a cache of that ({_said(error)})")


def _said(error: Exception) -> str:
    """A model's own words where they are a sentence; those of Python say nothing of it."""
    said = first_line(error)
    plain = not isinstance(error, (AttributeError, IndexError, KeyError, TypeError, UnboundLocalError))
    return said if plain and "<class" not in said else "its code fails; see --debug"


def _no_cache(model: nn.Module, found: str) -> BackendError:
    return BackendError(
        f"exporting {type(model).__name__} to ONNX as a decoder",
        found=found,
        do="Inputs of a graph can be keys and values, and recurrent states. --to onnx:cache=none writes a graph "
        "without them, which reads the whole text for every token; or use --to hf",
    )
