"""Models without a cache: classifiers, encoders, embedding models, models of images, encoders with their decoders."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsify.backends.onnx.tracing.contract import BATCH, SEQUENCE, Contract, Dims, Run
from sparsify.backends.onnx.tracing.wrappers import Plain
from sparsify.errors import BackendError
from sparsify.frontend.tracing.known import real_buffers
from sparsify.frontend.tracing.places import reason_of

# Sizes of the example: none is 0 or 1, which tracing would take for a constant, and no two are alike.
_ROWS, _LENGTH, _DECODER_LENGTH = 2, 5, 7


def plain_contract(
    model: nn.Module,
    run: Run,
    batch: Mapping[str, Tensor],
    names: Collection[str],
    fixed: Mapping[str, Tensor] | None = None,
) -> Contract:
    """The contract of a model without a cache, of the inputs in ``batch`` and those of ``names`` that it takes.

    Args:
        fixed: inputs whose numbers decide its sizes, beside those in ``batch``, which then keep the sizes they have.

    Raises:
        BackendError: the model does not run on them.
    """
    positional = all(name.isdigit() for name in batch)
    reasons: list[str] = []
    if fixed:
        return _fixed_contract(model, run, batch, fixed)
    wrapper = Plain(model, positional)
    for rows, apart, own in _ways(batch):
        inputs, dims = _example(model, batch, names, rows, apart, own)
        try:
            # Copies, which are without numbers: by those models know that they are traced.
            outputs = run(lambda inputs=inputs: wrapper.outputs({n: t.clone() for n, t in inputs.items()}))  # type: ignore[misc]
        except Exception as error:  # a model's own code raises whatever it likes
            reasons.append(reason_of(error))
            continue
        if not outputs:
            raise BackendError(
                f"exporting {type(model).__name__} to ONNX",
                found="its forward gives no tensor and no tuple of tensors",
                do="Use --to hf",
            )
        return Contract(
            "plain", wrapper, inputs, [], list(outputs), dims,
            one_row=reasons[0] if rows == 1 else None, one_length=reasons[0] if own else None,
        )  # fmt: skip
    if all(value.is_floating_point() for value in batch.values()) and not positional:
        # Sound that is padded to a multiple of something: how far follows from its length, and from buffers.
        with suppress(BackendError):
            return replace(_fixed_contract(model, run, batch, {}), one_length=reasons[0])
    inputs, _ = _example(model, batch, names, _ROWS, apart=True)
    raise _not_running(model, inputs, reasons)


def _fixed_contract(model: nn.Module, run: Run, batch: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> Contract:
    """A graph of one image's grid, say: no size in it is free."""
    inputs = {name: torch.zeros_like(value) for name, value in batch.items()}
    dims: Dims = {name: list(map(int, value.shape)) for name, value in inputs.items()}
    reasons: list[str] = []
    for buffers in (None, real_buffers(model.named_buffers(remove_duplicate=False))):
        wrapper = Plain(model, False, fixed, buffers)
        try:
            outputs = run(lambda wrapper=wrapper: wrapper.outputs(inputs))  # type: ignore[misc]
        except Exception as error:  # a model's own code raises whatever it likes
            reasons.append(reason_of(error))
            continue
        return Contract("plain", wrapper, inputs, [], list(outputs), dims, fixed=dict(fixed))
    raise _not_running(model, {**inputs, **fixed}, reasons)


def _not_running(model: nn.Module, inputs: Mapping[str, Tensor], reasons: list[str]) -> BackendError:
    return BackendError(
        f"exporting {type(model).__name__} to ONNX",
        found=f"it does not run on {', '.join(f'{k} {list(v.shape)}' for k, v in inputs.items())} ({reasons[0]})",
        do="Give calibration batches with the inputs that the model needs",
    )


def _ways(batch: Mapping[str, Tensor]) -> Iterator[tuple[int, bool, bool]]:
    """Numbers of rows, whether encoder and decoder read sequences of their own lengths, and whether all lengths are the
    batch's: what models run on, the freest first. A classifier without a padding token takes one row, BART's one
    sequence for both; a time series is as long as its config says, OneFormer's task, too."""
    yield _ROWS, True, False
    if any(name.startswith("decoder") for name in batch):
        yield _ROWS, False, False
    yield 1, True, False
    if "input_ids" in batch or any(map(_sequence, batch.values())):
        yield _ROWS, True, True


def _sequence(value: Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()


def _example(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    names: Collection[str],
    rows: int,
    apart: bool,
    given: bool = False,
) -> tuple[dict[str, Tensor], Dims]:
    positional = all(name.isdigit() for name in batch)
    first = BATCH if rows > 1 else 1
    ids = batch.get("input_ids")
    tokens = ids.shape[1] if ids is not None and ids.dim() == 2 else None
    inputs: dict[str, Tensor] = {}
    dims: Dims = {}

    def sequence(name: str, more: tuple[int, ...] = (), dtype: torch.dtype = torch.long) -> None:
        own = apart and name.startswith("decoder")
        length = _DECODER_LENGTH if own else _LENGTH
        if given:
            like = batch[name if name in batch else "input_ids"]
            length = int(like.shape[1])
        inputs[name] = torch.zeros(rows, length, *more, dtype=dtype)
        if name.endswith("attention_mask"):
            # A mask of ones alone lets models drop it while they are traced.
            inputs[name] += 1
            inputs[name][0, -1] = 0
        dims[name] = [first, length if given else f"decoder_{SEQUENCE}" if own else SEQUENCE, *more]

    for name, value in batch.items():
        # So many rows whatever the batch had, and of tokens more than one.
        named = f"input_{name}" if positional else name
        if _sequence(value) and not (given and positional):
            sequence(named, dtype=value.dtype)
            continue
        if value.dim() > 2 and not value.is_floating_point() and value.shape[1] == tokens:
            # So many numbers a token: boxes on a page, images that it may look at.
            sequence(named, tuple(map(int, value.shape[2:])), value.dtype)
            continue
        value = torch.zeros(rows, *value.shape[1:], dtype=value.dtype) if value.dim() else value
        inputs[named] = value
        dims[named] = [first, *map(int, value.shape[1:])]
    if "input_ids" in inputs:
        takes = inspect.signature(model.forward).parameters
        for name in dict.fromkeys(["attention_mask", *names]):
            if name in takes and name not in inputs:
                # Of what tokenizers give, boxes on a page alone have four numbers a token.
                sequence(name, (4,) if name == "bbox" else ())
    return inputs, dims
