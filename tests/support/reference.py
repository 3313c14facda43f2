"""Section 1.2 to 1.4 of algorithms.md with module hooks and loops: slow, plain, and independent of the engine."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn


def prune_blocks_with_hooks(
    model: nn.Module, blocks: nn.ModuleList, sequences: list[dict[str, Tensor]], pattern: str
) -> dict[str, Tensor]:
    """The block-sequential procedure on ``model`` in place; returns the mask of every linear by its weight's name."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Stop(Exception):
        pass

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise Stop

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in sequences:
        with contextlib.suppress(Stop):
            model(**sequence, use_cache=False)
    hook.remove()

    names = {module: name for name, module in model.named_modules()}
    masks = {}
    hidden = [args[0] for args, _ in caught]
    for block in blocks:
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        norms = {m: torch.zeros(m.in_features) for m in linears}
        counts = dict.fromkeys(linears, 0)

        def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            n = counts[module]  # noqa: B023
            norms[module] = norms[module] * n / (n + 1) + x.norm(p=2, dim=0) ** 2 / (n + 1)  # noqa: B023
            counts[module] = n + 1  # noqa: B023

        hooks = [m.register_forward_pre_hook(measure) for m in linears]
        for x, (args, kwargs) in zip(hidden, caught, strict=True):
            block(x, *args[1:], **kwargs)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            mask = _mask(linear.weight.data.abs() * norms[linear].sqrt(), pattern)
            linear.weight.data[mask] = 0
            masks[f"{names[linear]}.weight"] = mask
        outputs = [block(x, *args[1:], **kwargs) for x, (args, kwargs) in zip(hidden, caught, strict=True)]
        hidden = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return masks


def _mask(scores: Tensor, pattern: str) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if ":" in pattern:
        kept, m = map(int, pattern.split(":"))
        for column in range(0, scores.shape[1], m):
            order = scores[:, column : column + m].sort(dim=1, stable=True).indices
            mask.scatter_(1, column + order[:, : m - kept], True)
    else:
        order = scores.sort(dim=1, stable=True).indices
        mask.scatter_(1, order[:, : int(scores.shape[1] * float(pattern.rstrip("%")) / 100)], True)
    return mask
