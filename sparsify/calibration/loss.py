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
    return model_kind(program).endswith(("ForCausalLM", "LMHeadModel"))


def check_loss(program: Program, labelled: bool) -> fx.Node:
    """The logits of a model that :func:`loss` can be taken of.

    Raises:
        TraceError: it has none.
    """
    node, kind = logits_node(program), model_kind(program)
    known = is_causal(program) or kind.endswith(("ForConditionalGeneration", "ForImageClassification"))
    if node is None or not (known or labelled):
        raise TraceError(
            f"gradients of {kind}",
            found="no logits to take a loss of" if node is None else "a model whose loss needs labels",
            do="Use a pass that needs no gradients, or give batches with labels from Python",
        )
    return node


def loss(program: Program, logits: Tensor, batch: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
    """Mean cross-entropy over the predictions of one sample, a scalar in float32.

    With ``labels`` [batch] or [batch, sequence] (-100 is left out) those are predicted. Without, a causal model
    predicts the next token of ``input_ids``, a decoder beside an encoder the next of ``decoder_input_ids``, padding
    left out, and an image classifier its own first choice.
    """
    scores = logits.float()
    if labels is not None:
        if labels.shape != scores.shape[:-1]:
            raise CalibrationError(
                f"labels of shape {tuple(labels.shape)}",
                found=f"logits of shape {tuple(scores.shape)}",
                do="Give one label for each prediction",
            )
        if is_causal(program):
            scores, labels = scores[:, :-1], labels[:, 1:]
        return nn.functional.cross_entropy(scores.flatten(0, -2), labels.to(scores.device, non_blocking=True).flatten())
    if scores.dim() == 2:
        return nn.functional.cross_entropy(scores, scores.detach().argmax(dim=1))
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
