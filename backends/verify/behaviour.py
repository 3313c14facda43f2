"""What onnxruntime makes of tokens, held against torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.verify.result import Behaviour, Verification
from sparsify.errors import BackendError, first_line
from sparsify.files.manifest import section
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.frontend.materialize import materialize
from sparsify.frontend.skeleton import build_skeleton
from sparsify.frontend.source import Source
from sparsify.ir.store import TensorStore

# Of the logits' own size; the arithmetic is the same, its order is not.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def check_behaviour(
    result: Verification, store: GraphStore, checkpoint: TensorStore | None, folder: Path, manifest: Mapping[str, Any]
) -> None:
    """Run the graph and torch's model of ``folder``; what differs goes to ``result``."""
    if not (folder / "config.json").is_file():
        result.unchecked.append("outputs: no config.json, so there is no torch model to compare with")
        return
    compute = str(section(manifest, "onnx").get("compute", "float32"))
    try:
        stored = GraphStore(store.file, section(manifest, "onnx").get("transposed", ()))
        model = torch_model(folder, checkpoint or stored, getattr(torch, compute))
        behaviour = behave(store, model)
    except BackendError as error:
        result.problems.append(str(error))
        return
    except Exception as error:  # a graph with inputs of its own, which is no fault of its weights
        result.unchecked.append(f"outputs: not compared ({first_line(error)})")
        return
    if not math.isfinite(behaviour.difference):
        said = "outputs: NaN or infinity in onnxruntime's or torch's"
        if manifest.get("allow_nan"):
            result.unchecked.append(f"{said}, which --allow-nan let pass")
        else:
            result.problems.append(said)
        return
    result.behaviour = behaviour
    if behaviour.difference > _TOLERANCE[compute]:
        result.problems.append(
            f"outputs: they differ from torch's by {behaviour.difference:.1e} of their size, "
            f"more than {_TOLERANCE[compute]:.0e}"
        )


def torch_model(folder: Path, store: TensorStore, compute: torch.dtype) -> Any:
    """The model that ``folder``'s config describes, with the weights of ``store`` in ``compute``.

    Raises:
        CheckpointError: no config, or weights that do not fit it.
    """
    module = build_skeleton(folder, store=store)
    weights = weights_of_checkpoint(module, store)
    model = materialize(Source(folder.name, module, weights, folder), weights, set())
    return model.to(compute).eval()


def behave(store: GraphStore, model: Any, tokens: int = 16) -> Behaviour:
    """Run both on the same seeded input: a left-padded batch of two for decoders."""
    if any(value.name.startswith("past") for value in store.model.graph.inputs):
        return _decode(Runner(store.file, check=False), model, tokens)
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
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
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


def _relative(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    a, b = np.asarray(one, np.float32), np.asarray(other, np.float32)
    # Both may forbid the same by minus infinity; anything else that is not finite is a difference without a size.
    same = (a == b) & ~np.isfinite(a)
    a, b = np.where(same, 0, a), np.where(same, 0, b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.abs(a - b).max() / max(1.0, float(np.abs(b).max())))


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
