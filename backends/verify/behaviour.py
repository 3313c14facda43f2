"""What onnxruntime makes of a graph's weights and tokens, held against the checkpoint and torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sparsify.backends.onnx.runner import Runner, open_session
from sparsify.backends.onnx.store import GraphStore
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.frontend.materialize import materialize
from sparsify.frontend.skeleton import build_skeleton
from sparsify.frontend.source import Source
from sparsify.ir.store import TensorStore

# Weights asked of onnxruntime at once: enough to be quick, little beside a model.
_AT_ONCE = 256 << 20


def runtime_weights(store: GraphStore, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Each weight as a session gives it back: cast, joined and unpacked by onnxruntime's own operators.

    Where the graph converts a stored tensor, what comes is the converted one.

    Raises:
        BackendError: onnxruntime cannot load them.
    """
    part: list[str] = []
    size = 0
    for name in names:
        part.append(name)
        size += store.shape(name).numel() * 4
        if size > _AT_ONCE:
            yield from _ask(store, part)
            part, size = [], 0
    if part:
        yield from _ask(store, part)


def _ask(store: GraphStore, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    # A fresh graph, for the nodes are moved out of it; its weights stay where they are, in the folder.
    model = ir.load(store.file)
    graph = model.graph
    by_name = {v.name: v for n in graph for v in n.outputs} | dict(graph.initializers)
    outputs: list[ir.Value] = []
    asked: dict[str, str] = {}
    for name in names:
        value = by_name[name]
        cast = next((c for c in value.consumers() if c.op_type == "Cast" and value.dtype == ir.DataType.BFLOAT16), None)
        if cast is None and value.dtype == ir.DataType.BFLOAT16:
            # numpy has no bfloat16; every one of its values is a float32.
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
            graph.append(cast)
        out = value
        if cast is not None:
            out = cast.outputs[0]
        if out.producer() is None:
            same = ir.node("Identity", [out])
            graph.append(same)
            same.outputs[0].dtype, same.outputs[0].shape = out.dtype, out.shape
            out = same.outputs[0]
        out.name = f"weight_{len(outputs)}"
        if out.dtype is None:
            out.dtype = ir.DataType.FLOAT
        asked[out.name] = name
        outputs.append(out)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    graph.inputs.clear()
    needed: set[ir.Node] = set()
    todo = [o.producer() for o in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in needed:
            needed.add(node)
            todo += [v.producer() for v in node.inputs if v is not None]
    graph.remove([n for n in graph if n not in needed], safe=True)
    used = {v.name for n in needed for v in n.inputs if v is not None}
    for name in [n for n in graph.initializers if n not in used]:
        graph.initializers.pop(name)
    session = open_session(ir.to_proto(model).SerializeToString(), folder=store.file.parent)
    for out_name, array in zip(asked, session.run(list(asked), {}), strict=True):
        yield asked[out_name], torch.from_numpy(array)


def torch_model(folder: Path, store: TensorStore, compute: torch.dtype) -> Any:
    """The model that ``folder``'s config describes, with the weights of ``store`` in ``compute``.

    Raises:
        CheckpointError: no config, or weights that do not fit it.
    """
    module = build_skeleton(folder)
    weights = weights_of_checkpoint(module, store)
    model = materialize(Source(folder.name, module, weights, folder), weights, set())
    return model.to(compute).eval()


@dataclass(frozen=True)
class Behaviour:
    """Greatest differences between onnxruntime and torch: of the outputs, relative to their size, and of tokens.

    ``tokens`` is how many greedy ones were compared, of which ``agreeing`` are the same; 0 where nothing generates.
    """

    difference: float
    tokens: int
    agreeing: int


def behave(store: GraphStore, model: Any, tokens: int = 16) -> Behaviour:
    """Run both on the same seeded input: a left-padded batch of two for decoders."""
    if any(value.name.startswith("past") for value in store.model.graph.inputs):
        return _decode(Runner(store.file), model, tokens)
    session = open_session(store.file)
    feed = _inputs(session, model)
    names = [o.name for o in session.get_outputs()]
    got = dict(zip(names, session.run(names, {k: v.numpy() for k, v in feed.items()}), strict=True))
    with torch.no_grad():
        given = {k: v for k, v in feed.items() if not k.startswith("input_") or k == "input_ids"}
        out = model(**given, **({"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}))
    return Behaviour(max(_relative(got[name], out[name].numpy()) for name in names if name in out), 0, 0)


def _decode(runner: Runner, model: Any, tokens: int) -> Behaviour:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    want = torch.stack(out.logits, 1).float().numpy()
    chosen = out.sequences[:, 12:].numpy()
    # The same tokens are fed to both, so that one near-tie does not make all that follows differ.
    worst, agreeing = 0.0, 0
    cache, seen, step = runner.empty(2), mask.numpy(), ids.numpy()
    for t in range(tokens):
        logits, cache = runner.forward(step, seen, cache)
        last = logits[:, -1].astype(np.float32)
        worst = max(worst, _relative(last, want[:, t]))
        agreeing += int((last.argmax(-1) == chosen[:, t]).sum())
        step = chosen[:, t : t + 1]
        seen = np.concatenate([seen, np.ones_like(step)], 1)
    return Behaviour(worst, 2 * tokens, agreeing)


def _relative(one: Any, other: Any) -> float:
    one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
    return float(np.abs(one - other).max() / max(1.0, float(np.abs(other).max())))


def _inputs(session: Any, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    feed: dict[str, Tensor] = {}
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 2)
    for info in session.get_inputs():
        sizes: Mapping[str, int] = {"batch_size": 2, "decoder_sequence_length": 5}
        shape = [n if isinstance(n, int) else sizes.get(str(n), 7) for n in info.shape]
        if "mask" in info.name:
            feed[info.name] = torch.ones(shape, dtype=torch.long)
            feed[info.name][0, -2:] = 0
        elif "int" in info.type:
            feed[info.name] = torch.randint(1, vocabulary, shape, generator=generator)
        else:
            feed[info.name] = torch.randn(shape, generator=generator).to(model.dtype)
    return feed
