"""Which contract a model is exported under."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from sparsify.backends.onnx.options import Cache
from sparsify.backends.onnx.tracing.cached import cached_contract
from sparsify.backends.onnx.tracing.contract import Contract, Run
from sparsify.backends.onnx.tracing.plain import plain_contract
from sparsify.backends.onnx.tracing.signature import missing
from sparsify.errors import BackendError
from sparsify.frontend.tracing.both_ways import reads_both_ways

# Traced, the place of an image within the text stays the example's: no other length runs.
_OF_ONE_LENGTH = frozenset({"kosmos-2"})


def contract_for(
    model: nn.Module,
    run: Run,
    batch: Mapping[str, Tensor],
    names: Collection[str] = (),
    cache: Cache = "keep",
    fixed: Mapping[str, Tensor] | None = None,
) -> Contract:
    """The contract for ``model``.

    Args:
        model: a module whose parameters take no memory.
        batch: example inputs of a plain model, name to tensor; digits name positional inputs.
        names: inputs that the model's tokenizer gives.
        cache: whether a model that generates keeps past tokens' states.
        fixed: inputs of a plain model whose numbers decide its sizes.

    Raises:
        BackendError: the model generates, but its cache is of a kind that no exported graph can hold; or how it attends
            depends on numbers in its inputs.
    """
    if reads_both_ways(model):
        raise BackendError(
            f"exporting {type(model).__name__} to ONNX",
            found="it reads a text in both directions, or in one where its attention mask has a zero: no graph can",
            do="Use --to hf",
        )
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", bool)() and not getattr(config, "is_encoder_decoder", False)
    if generates and cache == "keep":
        contract = cached_contract(model, run)
    else:
        if getattr(config, "model_type", None) in _OF_ONE_LENGTH:
            raise BackendError(
                f"exporting {type(model).__name__} to ONNX",
                found="its graph would hold for one length alone: a size within it becomes a number in the trace",
                do="Use --to hf",
            )
        contract = plain_contract(model, run, batch, names, fixed)
        if generates:
            contract = dataclasses.replace(contract, kind="uncached")
    frozen, media = missing(model, [*contract.inputs, *contract.fixed])
    return dataclasses.replace(contract, frozen=frozen, media=media)
