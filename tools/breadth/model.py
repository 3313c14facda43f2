"""A tiny model of a type, seeded, with inputs on which it runs."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from breadth.exceptions import CANNOT
from breadth.inputs import Batch, Inputs
from breadth.kinds import main_class
from breadth.shrink import tiny_config
from sparsify.frontend.text_config import text_config


class Unusable(Exception):
    """transformers itself builds or runs no tiny model of this type here."""


@dataclass
class Tiny:
    """``batches``: two, of the same shapes. ``exact``: what the model gives of each, as a flat list of tensors."""

    kind: str
    model: Any
    batches: list[Batch]
    exact: list[list[Tensor]]
    folder: Path
    large: list[str] = field(default_factory=list)


def make(kind: str, folder: Path) -> Tiny:
    """Build it, find inputs for it, and save it.

    Raises:
        Unusable: transformers has no class for it, builds or runs none, or does not load what it saved.
    """
    model, large = build(kind)
    batches, exact = _inputs(model)
    try:
        model.save_pretrained(folder)
    except Exception as error:
        raise Unusable(f"does not save: {said(error)}") from error
    if (saved := json.loads((folder / "config.json").read_text())["model_type"]) != kind:
        raise Unusable(f"saves itself as {saved}")
    again, odd = load(type(model), folder)
    if odd:
        raise Unusable(f"does not load what it saved: {odd}")
    if not same(run(again, batches[0]), exact[0]):
        raise Unusable("loads another model than it saved")
    return Tiny(kind, model, batches, exact, folder, large)


def build(kind: str, seed: int = 0) -> tuple[Any, list[str]]:
    """The seeded model, in float32 and eval mode, and large sizes in its config.

    Raises:
        Unusable: there is none.
    """
    own = main_class(kind)
    _put_right(kind)
    if own is None:
        raise Unusable("transformers has no model of this config")
    if kind in CANNOT:
        raise Unusable(CANNOT[kind])
    if own.forward is torch.nn.Module.forward:
        raise Unusable(f"{own.__name__} has no forward: only its parts can be run")
    try:
        config, large = tiny_config(kind)
        torch.manual_seed(seed)
        model = own(config).eval()
    except Exception as error:
        raise Unusable(f"builds no tiny model: {said(error)}") from error
    if config.model_type != kind:
        raise Unusable(f"another name of {config.model_type}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or "A_log" in name or not parameter.numel():
                continue
            # What begins all alike hides swapped channels; what begins at zero hides all that it multiplies.
            if parameter.dim() == 1 or bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if (count := sum(p.numel() for p in model.parameters())) > 20_000_000:
        raise Unusable(f"the tiny config has {count:,} parameters: {', '.join(large[:6])}")
    return model, large


def run(model: Any, batch: Batch) -> list[Tensor]:
    """The model's outputs in eager mode without a cache of past tokens, flat."""
    names = inspect.signature(model.forward).parameters
    text = text_config(model.config)
    more: dict[str, Any] = {}
    if "use_cache" in names or any(getattr(c, "use_cache", None) is not None for c in (model.config, text)):
        more["use_cache"] = False
    with torch.no_grad():
        try:
            out = model(**batch, **more)
        except TypeError as error:
            if not more or "use_cache" not in str(error):
                raise
            out = model(**batch)
    return leaves(out)


def leaves(out: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(dict(out) if hasattr(out, "keys") else out) if isinstance(each, Tensor)]


def load(own: Any, folder: Path) -> tuple[Any, str]:
    """The model of a folder by transformers' own class, and what it says of keys that did not fit."""
    model, report = own.from_pretrained(folder, output_loading_info=True)
    odd = {k: sorted(map(str, v))[:3] for k, v in report.items() if v and k != "error_msgs"}
    return model.eval(), "; ".join(f"{k} {', '.join(v)}" for k, v in odd.items())


def differ(got: list[Tensor], exact: list[Tensor]) -> float:
    """The greatest difference of two lists of outputs, relative to each tensor's size; infinity where not alike."""
    if len(got) != len(exact):
        return float("inf")
    worst = 0.0
    for one, other in zip(got, exact, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if not other.numel():
            continue
        if not other.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(one.to(other.dtype), other) else float("inf"))
            continue
        one, other = one.double(), other.double()
        if not torch.equal(one.isfinite(), other.isfinite()):
            return float("inf")
        size = float(torch.nan_to_num(other, 0, 0, 0).abs().max())
        gap = float(torch.nan_to_num(one - other, 0, 0, 0).abs().max())
        worst = max(worst, gap / max(size, 1e-6))
    return worst


def same(got: list[Tensor], exact: list[Tensor]) -> bool:
    return differ(got, exact) <= 1e-6


def said(error: BaseException) -> str:
    """An error of another library in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__
    return text[:300]


def _put_right(kind: str) -> None:
    """transformers 5.24: Llama 4 copies a field that its language model's output has not, whatever it is given."""
    if kind == "llama4":
        from transformers.modeling_outputs import MoeCausalLMOutputWithPast

        if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
            MoeCausalLMOutputWithPast.image_outputs = None


def _inputs(model: Any) -> tuple[list[Batch], list[list[Tensor]]]:
    # Of the last set, too: the first may just lack an input.
    first, last, tried = "", "", 0
    inputs = Inputs(model)
    for names in dict.fromkeys(inputs.sets()):
        for batch in inputs.batches(names, 1):
            tried += 1
            if tried > 24:
                break
            try:
                torch.manual_seed(0)
                one = run(model, batch)
                torch.manual_seed(1)
                again = run(model, batch)
            except Exception as error:
                last = f"{'+'.join(names)}: {said(error)}"
                first = first or last
                continue
            if not one:
                first = first or "gives no tensor"
                continue
            if not all(bool(t.isfinite().all()) for t in one if t.is_floating_point() and t.dim() > 1) and not any(
                t.is_floating_point() and bool(t.isfinite().any()) for t in one
            ):
                first = first or "gives NaN"
                continue
            if not same(again, one):
                first = first or "draws random numbers when it runs"
                continue
            way = [b for b in inputs.batches(names, 2) if _shapes(b) == _shapes(batch)]
            batches = [batch, way[0]]
            return batches, [one, run(model, batches[1])]
    both = dict.fromkeys(text[:160] for text in (first, last) if text)
    raise Unusable(f"runs on no inputs that were tried ({'; '.join(both) or 'none known'})")


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in batch.items()}
