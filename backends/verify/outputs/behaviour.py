"""What onnxruntime makes of tokens, held against torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsify.backends.onnx.running.runner import Runner, is_state
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.onnx.storage.store import GraphStore
from sparsify.backends.onnx.tracing.wrappers import named_tensors
from sparsify.backends.verify.outputs.feeds import feed_for, sizes_for
from sparsify.backends.verify.outputs.rounding import rounding_of
from sparsify.backends.verify.result import Behaviour, Verification
from sparsify.errors import BackendError, first_line
from sparsify.files.manifest import section
from sparsify.frontend.matching import weights_of_checkpoint
from sparsify.frontend.materialize import materialize
from sparsify.frontend.skeleton import build_skeleton
from sparsify.frontend.source import Source
from sparsify.frontend.text_config import text_config
from sparsify.frontend.tracing.caches import call_arguments, without_cache
from sparsify.ir.store import TensorStore

_ALONE = "--weights-only checks the weights alone"
# So many times what torch's own rounding makes of the outputs may differ: its order is another.
_ROUNDING = 4
# Of the logits' own size; the arithmetic is the same, its order is not.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# Of our operators over weights of few bits: inputs are rounded to 8 bits there, or products to nothing.
_FEW_BITS = 1e-1


def check_behaviour(
    result: Verification, store: GraphStore, checkpoint: TensorStore | None, folder: Path, manifest: Mapping[str, Any]
) -> None:
    """Run the graph and torch's model of ``folder``; what differs goes to ``result``."""
    if not (folder / "config.json").is_file():
        result.problems.append(f"outputs: not compared, for no config.json says what torch model they are of; {_ALONE}")
        return
    compute = str(section(manifest, "onnx").get("compute", "float32"))
    try:
        stored = GraphStore(store.file, section(manifest, "onnx").get("transposed", ()))
        model = torch_model(folder, checkpoint or stored, getattr(torch, compute))
        fixed = {name: torch.tensor(value) for name, value in dict(section(manifest, "onnx").get("fixed", {})).items()}
        behaviour = behave(store, model, fixed=fixed)
        # Without our library the same file computes what torch does, and to its precision.
        plain = behave(store, model, fixed=fixed, library=False) if store.of_few_bits() else behaviour
    except BackendError as error:
        result.problems.append(str(error))
        return
    except Exception as error:  # onnxruntime's kinds are its own, and a model's own code raises whatever it likes
        # Perhaps a graph with inputs of its own; but nobody may call sound what nobody has seen run.
        result.problems.append(f"outputs: not compared ({first_line(error)}); {_ALONE}")
        return
    if not math.isfinite(max(behaviour.difference, plain.difference)):
        said = "outputs: NaN or infinity in onnxruntime's or torch's"
        if manifest.get("allow_nan"):
            result.unchecked.append(f"{said}, which --allow-nan let pass")
        else:
            result.problems.append(said)
        return
    result.behaviour = behaviour
    allowed = max(_TOLERANCE[compute], _ROUNDING * plain.rounding)
    judged = [(plain, allowed, "")]
    if plain is not behaviour:
        judged = [(plain, allowed, " without our library"), (behaviour, max(allowed, _FEW_BITS), " with it")]
    for found, most, how in judged:
        if found.difference > most:
            result.problems.append(
                f"outputs{how}: they differ from torch's by {found.difference:.1e} of their size, more than {most:.0e}"
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


def behave(
    store: GraphStore,
    model: Any,
    tokens: int = 16,
    fixed: Mapping[str, torch.Tensor] | None = None,
    library: bool = True,
) -> Behaviour:
    """Run both on the same seeded inputs, of several numbers of rows: decoders first on a left-padded batch of two.

    Args:
        fixed: inputs of the model that the graph has not, for it was made for these numbers.
        library: as :func:`open_session`.
    """
    session = open_session(store.file, library=library)
    if any(is_state(value.name) for value in store.model.graph.inputs):
        runner = Runner(store.file, check=False, session=session)
        found = _decode(runner, model, tokens)
        worst = max(found.difference, *(_forward(runner, model, rows, 3) for rows in (1, 5)))
        return dataclasses.replace(found, difference=worst)
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    sizes = sizes_for(session.get_inputs(), context if isinstance(context, int) else None)
    compared, refused = [], None
    for rows, length in sizes:
        feed = feed_for(session.get_inputs(), model, rows, length)
        try:
            out = _outputs(model, {**feed, **(fixed or {})})
        except Exception as error:  # torch's own model may not take one row (a norm over the batch)
            refused = error
            continue
        compared.append(_compare(session, model, feed, out, fixed or {}))
    if refused is not None and not compared:
        raise refused
    return Behaviour(max(worst for worst, _ in compared), 0, 0, max(rounding for _, rounding in compared))


def _compare(
    session: Any,
    model: Any,
    feed: Mapping[str, torch.Tensor],
    out: Mapping[str, torch.Tensor],
    fixed: Mapping[str, torch.Tensor],
) -> tuple[float, float]:
    """The greatest difference, and torch's own rounding where that is large: some models make much of little."""
    names = [o.name for o in session.get_outputs()]
    got = dict(zip(names, session.run(names, {k: v.numpy() for k, v in feed.items()}), strict=True))
    rows = len(next(iter(feed.values())))
    same = [name for name in names if name in out]
    if not same:
        raise BackendError(
            "comparing outputs with torch",
            found=f"the graph gives {', '.join(names)}, the model {', '.join(out)}",
            do="Only outputs of one name can be compared; --weights-only leaves them out",
        )
    for name in same:
        if got[name].shape != tuple(out[name].shape):
            raise BackendError(
                f"output {name} for {rows} rows",
                found=f"shape {list(got[name].shape)} from the graph, {list(out[name].shape)} from torch",
                do="Export it again; a graph of another maker may hold one number of rows alone",
            )
    worst = max(_relative(got[name], out[name].float().numpy()) for name in same)
    if worst <= _TOLERANCE["float32"] or model.dtype != torch.float32:
        return worst, 0.0

    def give(own: Any, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        found = _outputs(own, given)
        return [found[name] for name in same]

    def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return max(_relative(a.float().numpy(), b.float().numpy()) for a, b in zip(one, other, strict=True))

    return worst, rounding_of(model, {**feed, **fixed}, give, differ)


def _outputs(model: Any, feed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad(), without_cache(model):
        _, named = call_arguments(model, feed)
        return named_tensors(model(**named))


def _forward(runner: Runner, model: Any, rows: int, length: int) -> float:
    vocabulary = text_config(model.config).vocab_size
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(rows))
    got, _ = runner.forward(ids.numpy(), np.ones((rows, length), np.int64), runner.empty(rows))
    with torch.no_grad():
        return _relative(got, model(input_ids=ids).logits.float().numpy())


def _decode(runner: Runner, model: Any, tokens: int) -> Behaviour:
    vocabulary = text_config(model.config).vocab_size
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
