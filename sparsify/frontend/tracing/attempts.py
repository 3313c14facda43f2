"""One trace after another, each with more known or put right than the one before, until one succeeds.

The first is what nearly every model needs. What helps the others would make their graphs no better, and is not tried
on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import TraceError, first_line
from sparsify.frontend.tracing.caches import call_arguments
from sparsify.frontend.tracing.experts import experts_at_once
from sparsify.frontend.tracing.known import real_buffers
from sparsify.frontend.tracing.literal import could_be_literal, literal
from sparsify.frontend.tracing.mends import as_eager
from sparsify.frontend.tracing.places import asks_numbers, reason_of

Batch = Mapping[str, Tensor]


def attempted(
    module: nn.Module, batch: Batch, device: torch.device
) -> tuple[torch.export.ExportedProgram, dict[str, Tensor]]:
    """``module``, which is on ``device``, as torch exports it, and the inputs whose numbers are in the graph.

    Raises:
        TraceError: it cannot be exported.
    """
    known = {name: batch[name].to(device) for name in could_be_literal(batch)}
    buffers = real_buffers(module.named_buffers(remove_duplicate=False))
    ways: list[tuple[Batch, Callable[[], AbstractContextManager[Any]]]] = [({}, nullcontext)]
    if known:
        ways.append((known, lambda: literal(module, known)))
    ways += [(known, lambda: literal(module, known, buffers)), (known, lambda: _at_last(module, known, buffers))]
    failed: list[Exception] = []
    while ways:
        literals, way = ways.pop(0)
        rest = {name: torch.zeros_like(value, device=device) for name, value in batch.items() if name not in literals}
        args, kwargs = call_arguments(module, rest)
        try:
            with way():
                exported = torch.export.export(module, args, kwargs, strict=False)
            return exported, {name: value.cpu() for name, value in literals.items()}
        except TraceError:
            raise
        except Exception as error:  # export raises many kinds; all mean that there is no graph
            if not asks_numbers(error):
                del ways[:-1]
            if not failed or asks_numbers(error):
                # A traceback holds the graph so far; one is kept for whoever debugs.
                failed = [error]
    raise _refusal(module, batch, failed[0]) from failed[0]


@contextmanager
def _at_last(module: nn.Module, known: Batch, buffers: Batch) -> Iterator[None]:
    with as_eager(module), experts_at_once(module), literal(module, known, buffers):
        yield


def _refusal(module: nn.Module, batch: Batch, error: BaseException) -> TraceError:
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
    do = f"Inputs were {shapes}; see the traceback with --debug"
    if asks_numbers(error):
        do = (
            f"A graph goes one way, whatever it is given. Inputs were {shapes}: where one of them decides (a mask), "
            f"leave it out or give it; else this model cannot be captured (torch.export: {first_line(error)})"
        )
    return TraceError(f"capturing {type(module).__name__}", found=f"torch.export fails: {reason_of(error)}", do=do)
