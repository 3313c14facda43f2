"""Zeros that stay zeros while anybody trains: ``with sparsify.hold_zeros(model): …``, and a callback for the Trainer.

Gradients of pruned entries are zero before an optimizer sees them, so that they have no part in its moments or in a
norm that is clipped; what an optimizer does to them all the same (noise, a merged adapter) is taken back after every
step.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from sparsify.errors import SpecError, VerifyError
from sparsify.method.selection import to_hold
from sparsify.tuning.masks import broken_zeros


@dataclass(frozen=True)
class Held:
    """Weights whose zeros are held: per name the parameter and where it is kept."""

    parameters: dict[str, nn.Parameter]
    kept: dict[str, Tensor]

    def apply(self) -> None:
        """Make every pruned entry zero."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.masked_fill_(~self.kept[name].to(parameter.device), 0)

    def broken(self) -> dict[str, int]:
        """How many pruned entries of each weight are not zero."""
        return broken_zeros(self.parameters, self.kept)


@contextmanager
def hold_zeros(model: nn.Module) -> Iterator[Held]:
    """While it is open, no training changes a zero of ``model``'s pruned weights, whatever the optimizer.

    Held are the zeros that parameters of two and more axes, no embeddings, have when it begins. Works through
    ``DistributedDataParallel``, whose parameters are the model's own, and for peft's adapters, also those added
    meanwhile: merging and unmerging them is masked, as long as it is open. It warns of adapters that are not merged
    when it ends: merged later they fill the zeros.

    Raises:
        SpecError: no weight of the model is pruned, or its parameters are sharded (FSDP, DeepSpeed ZeRO 3), where no
            process sees a weight whole. VerifyError: a zero was changed behind its back, or
            a weight was replaced by another one.

    >>> import torch, sparsify
    >>> net = torch.nn.Linear(8, 4)
    >>> _ = torch.nn.init.constant_(net.weight[:, :4].data, 0)
    >>> with sparsify.hold_zeros(net):
    ...     optimizer = torch.optim.AdamW(net.parameters())
    ...     net(torch.ones(1, 8)).sum().backward()
    ...     optimizer.step()
    >>> int((net.weight == 0).sum())
    16
    """
    with ExitStack() as stack:
        held = _hold(model, stack, stack)
        yield held
        _check_held(model, held)
        if unmerged := sum(not getattr(part, "merged", True) for part in _adapted(model, held)):
            warnings.warn(
                f"the zeros of {unmerged} weights are held no longer, and adapters on them are not merged: merged now "
                "they fill the zeros. Merge them (merge_and_unload) within hold_zeros",
                RuntimeWarning,
                stacklevel=3,
            )


class HoldZeros(TrainerCallback):
    """For transformers' Trainer: ``Trainer(…, callbacks=[sparsify.HoldZeros()])`` holds zeros from the first step to
    the last; see :func:`hold_zeros`. peft's adapters are merged after training: that is masked until :meth:`close` is
    called, or as long as the model is there.

    The Trainer tells its callbacks of no exception: after one the zeros are held until the next training, until
    :meth:`close` is called, or as long as the model is there.
    """

    def __init__(self) -> None:
        self._open: tuple[ExitStack, Held] | None = None
        self._merging = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        # Open still, where a batch that was too large ends a training and a smaller one begins it again.
        self.close()
        stack = ExitStack()
        try:
            self._open = stack, _hold(model, stack, self._merging)
        except BaseException:
            stack.close()
            self._merging.close()
            raise

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        if self._open is not None:
            try:
                _check_held(model, self._open[1])
            except BaseException:
                self.close()
                raise
            opened, self._open = self._open, None
            opened[0].close()

    def close(self) -> None:
        """Hold nothing any more; what the zeros are now is not looked at."""
        opened, self._open = self._open, None
        if opened is not None:
            opened[0].close()
        self._merging.close()


def _hold(model: nn.Module, stack: ExitStack, merging: ExitStack) -> Held:
    """Hold the zeros of ``model`` while it is trained, until ``stack`` is closed, and where adapters are merged, until
    ``merging`` is."""
    if not isinstance(model, nn.Module):
        raise SpecError("holding zeros", found=f"{type(model).__name__}, no torch module", do="Give the model")
    _check_whole(model)
    held = _find(model)
    watched = weakref.ref(model)
    for name, parameter in held.parameters.items():
        if parameter.requires_grad:
            stack.callback(parameter.register_hook(_masking(held.kept[name])).remove)
    checked: list[bool] = []

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (still := watched()) is not None:
            if not checked:
                # It may have been sharded since: what is held would be parameters that nobody trains.
                _check_whole(still)
                checked.append(True)
            _check_there(still, held)
            held.apply()

    stack.callback(register_optimizer_step_post_hook(after_step).remove)
    for part in model.modules():
        _mask_merging(part, held, merging)
    # Adapters may be added meanwhile.
    stack.callback(
        register_module_module_registration_hook(lambda _, __, part: _mask_merging(part, held, merging)).remove
    )
    return held


def _check_held(model: nn.Module, held: Held) -> None:
    """At the end. Raises:
    VerifyError: a zero was changed by no optimizer, or a weight was replaced by another one.
    """
    _check_there(model, held)
    if broken := held.broken():
        held.apply()
        name, count = next(iter(broken.items()))
        raise VerifyError(
            f"holding the zeros of {name}",
            found=f"{count} pruned entries were written to without an optimizer's step",
            do="They are zero again; assign to weights outside of hold_zeros",
        )


def _find(model: nn.Module) -> Held:
    tables = {
        id(parameter)
        for part in model.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.is_floating_point() and id(parameter) not in tables
    }
    kept = to_hold((name, parameter.detach() != 0) for name, parameter in found.items())
    if not kept:
        raise SpecError(
            "holding the zeros of a model",
            found=f"no weight with zeros among {len(found)}: nothing is pruned",
            do="Prune it first, and load what was written",
        )
    return Held({name: found[name] for name in kept}, kept)


def _check_there(model: nn.Module, held: Held) -> None:
    """What took the place of a held parameter would be trained with nothing that holds its zeros."""
    there = {id(parameter) for parameter in model.parameters()}
    for name, parameter in held.parameters.items():
        if id(parameter) not in there:
            raise VerifyError(
                f"holding the zeros of {name}",
                found="another parameter in its place, whose zeros nobody holds",
                do="Assign weights before hold_zeros begins; within it load_state_dict without assign=True",
            )


def _check_whole(model: nn.Module) -> None:
    for part in model.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise _sharded("FullyShardedDataParallel")
    for parameter in model.parameters():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise _sharded("FSDP 2 or tensor parallelism (DTensor)")
        if hasattr(parameter, "ds_id"):
            raise _sharded("DeepSpeed ZeRO 3")


def _sharded(what: str) -> SpecError:
    return SpecError(
        "holding the zeros of a model",
        found=f"parameters that are sharded by {what}: no process sees a weight whole",
        do="Train with DistributedDataParallel, or on one device (sparsify tune)",
    )


def _masking(kept: Tensor) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(~kept.to(gradient.device), 0)

    return hook


def _is_adapted(part: Any, weights: Collection[int]) -> bool:
    """Whether it is an adapter's layer of peft's, over one of the parameters with these ids."""
    return hasattr(part, "get_base_layer") and any(id(parameter) in weights for parameter in part.parameters())


def _adapted(model: nn.Module, held: Held) -> list[Any]:
    weights = {id(parameter) for parameter in held.parameters.values()}
    # Not those that hold such a layer.
    return [part for part in model.modules() if hasattr(part, "merge") and _is_adapted(part, weights)]


def _mask_merging(part: Any, held: Held, stack: ExitStack) -> None:
    """Let an adapter's layer of peft's leave zeros as they are, merged or taken out again (of any number of adapters,
    with ``safe_merge`` or without, by ``merge_and_unload`` too), until ``stack`` is closed."""
    if not _is_adapted(part, {id(parameter) for parameter in held.parameters.values()}):
        return
    for name in ("merge", "unmerge"):
        if isinstance(method := getattr(part, name, None), MethodType):
            before = vars(part).get(name)
            setattr(part, name, _masked(method, held))
            stack.callback(_put_back, part, name, before)


def _masked(method: MethodType, held: Held) -> MethodType:
    # A method, and of what it is given: a copy of the model calls its own.
    @wraps(method.__func__)
    def masked(part: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method.__func__(part, *args, **kwargs)
        finally:
            held.apply()

    return MethodType(masked, method.__self__)


def _put_back(part: nn.Module, name: str, before: Any) -> None:
    if before is None:
        vars(part).pop(name, None)
    else:
        setattr(part, name, before)
