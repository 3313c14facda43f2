"""The loss that gradients are taken of, for the kinds of model that have one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.errors import CalibrationError, TraceError
from sparsify.ir.program import Program


def logits_node(program: Program) -> fx.Node | None:
    """The node whose value is the model's logits, or None."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    leaves: Any = output.args[0]
    if "logits" in program.output_names:
        node = leaves[program.output_names.index("logits")]
        if isinstance(node, fx.Node):
            return node
    return None


def model_kind(program: Program) -> str:
    return program.model or "a bare graph"


def is_causal(program: Program) -> bool:
    """Whether each position of the logits is of the token behind it: a language model without an encoder beside it."""
    if "decoder_input_ids" in {node.meta["input"] for node in program.inputs}:
        return False
    return model_kind(program).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def check_loss(program: Program, labelled: bool) -> fx.Node:
    """The logits of a model that :func:`loss` can be taken of.

    Raises:
        TraceError: it has none.
    """
    node, kind = logits_node(program), model_kind(program)
    found = None
    if node is None:
        found = "no logits to take a loss of"
    elif not labelled:
        found = _needs_labels(program, node)
    if node is None or found is not None:
        raise TraceError(
            f"gradients of {kind}",
            found=str(found),
            do="Use a pass that needs no gradients (llm-pruner with importance=l2, say)"
            + ("" if node is None else ", or give batches with labels from Python"),
        )
    return node


def _needs_labels(program: Program, logits: fx.Node) -> str | None:
    """Why a loss of these logits needs labels; None where it does not."""
    shape = logits.meta["val"].shape
    if _chooses_a_class(program):
        return "one score and no classes, of which it could choose one: a loss needs labels" if shape[-1] == 1 else None
    tokens = "decoder_input_ids" in {node.meta["input"] for node in program.inputs}
    return None if len(shape) == 3 and (tokens or is_causal(program)) else "a model whose loss needs labels"


def _chooses_a_class(program: Program) -> bool:
    return model_kind(program).endswith("Classification")


def loss(program: Program, logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
    """Mean cross-entropy over the predictions of one sample, a scalar in float32.

    With ``labels`` [batch] or [batch, sequence] (-100 is left out) those are predicted; a model of one score (a reward)
    has the squared distance from them. Without, a causal model predicts the next token of ``input_ids``, a decoder
    beside an encoder the next of ``decoder_input_ids``, padding left out, and a classifier its own first choice.
    """
    scores = logits.float()
    if labels is not None:
        if labels.shape != scores.shape[:-1]:
            raise CalibrationError(
                f"labels of shape {tuple(labels.shape)}",
                found=f"logits of shape {tuple(scores.shape)}",
                do="Give one label for each prediction",
            )
        labels = labels.to(scores.device, non_blocking=True)
        if scores.shape[-1] == 1:
            return nn.functional.mse_loss(scores[..., 0], labels.float())
        if is_causal(program):
            scores, labels = scores[:, :-1], labels[:, 1:]
        return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())
    if _chooses_a_class(program):
        chosen = scores.detach().argmax(dim=-1)
        if scores.dim() == 3 and "attention_mask" in batch:
            chosen[batch["attention_mask"].to(scores.device, non_blocking=True) == 0] = -100
        return nn.functional.cross_entropy(scores.flatten(0, -2), chosen.flatten())
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    if f"{prefix}input_ids" not in batch:
        raise CalibrationError(
            f"the loss of {model_kind(program)}",
            found=f"inputs {', '.join(batch)}: no token ids to predict",
            do="Give the batches labels too, or use a pass without gradients",
        )
    following = batch[f"{prefix}input_ids"].to(scores.device, non_blocking=True)[:, 1:].clone()
    mask = batch.get(f"{prefix}attention_mask")
    if mask is not None:
        following[mask.to(scores.device, non_blocking=True)[:, 1:] == 0] = -100
    return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), following.flatten())


def loss_scale(dtype: torch.dtype) -> float:
    """By how much a loss is multiplied before it is differentiated: float16 gradients would vanish otherwise."""
    return 1024.0 if dtype == torch.float16 else 1.0
