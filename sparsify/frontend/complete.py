"""Whether the tensors of a folder are those of the model that its config.json describes, and what to do where not."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError, near
from sparsify.frontend.text_config import text_config

# Fields by which a config counts layers that predict further tokens and that transformers does not run.
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def may_be_missing(model: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter or saved buffer of that name may be without a tensor, as the model's class says by patterns:
    transformers computes it when it loads the model.
    """
    patterns = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def check_complete(
    model: nn.Module,
    wanted: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    unknown: Sequence[str],
    aliases: Mapping[str, str],
    stored: Sequence[str],
    strict: bool,
) -> None:
    """Hold what was found against what the model has. Tensors that it has no place for are no fault in themselves
    (heads of other tasks, layers that predict further tokens, buffers of old versions): transformers passes over them.

    Args:
        wanted: the model's state; ``shapes``: those found, by parameter. stored: every tensor of the folder, of which
            ``unknown`` have no place. strict: refuse these.

    Raises:
        CheckpointError: a parameter without a tensor or of another shape; layers that the config does not count.
    """
    kind = type(model).__name__
    allowed = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq"]
    strange = [key for key in unknown if not any(re.search(pattern, key) for pattern in allowed)]
    optional = may_be_missing(model)
    held = {aliases.get(name, name) for name in shapes}
    missing = [name for name in wanted if aliases.get(name, name) not in held and not optional(name)]
    found = (
        f"{len(strange)} of {len(stored)} tensors have no place in the config's model, first {next(iter(strange), '')}"
    )
    if strange and (more := _uncounted(model, strange, set(stored) - set(unknown))):
        raise CheckpointError(f"weights for {kind}", found=found, do=more)
    if strange and missing:
        do = f"Does config.json belong to these weights? {missing[0]} is not there. {near(strange[0], wanted)}"
        raise CheckpointError(f"weights for {kind}", found=found, do=do)
    if missing:
        raise CheckpointError(
            f"weights for {kind}",
            found=f"{len(missing)} parameters have no tensor in the folder, first {missing[0]}",
            do=_why_missing(model, missing),
        )
    for name, shape in shapes.items():
        if wanted[name].shape != shape:
            raise CheckpointError(
                f"tensor {name}",
                found=f"shape {tuple(shape)} in the folder, {tuple(wanted[name].shape)} by config.json",
                do=_why_shape(model, wanted[name].shape, shape),
            )
    if strange and strict:
        do = "Without --strict (strict=True) they are carried over as they are"
        raise CheckpointError(f"weights for {kind}", found=found, do=do)


def _uncounted(model: Any, strange: Iterable[str], placed: Collection[str]) -> str | None:
    """What to do where ``strange`` tensors are whole layers like those that the model has, one number further."""
    config: Any = getattr(model, "config", None)
    text = text_config(config)
    if any(getattr(text, name, None) for name in _FURTHER):
        return None
    known, others = _lists(placed), _lists(strange)
    for (stack, number), parts in others.items():
        alike = sorted(n for (s, n), p in known.items() if s == stack and p == parts)
        if alike and (stack, number) not in known:
            largest = max(n for (s, n) in others if s == stack)
            return (
                f"{stack}{number} is a layer like {stack}{alike[0]}, and config.json counts {alike[-1] + 1} of them: "
                f"let it count {largest + 1}, or take these tensors out"
            )
    return None


def _lists(names: Iterable[str]) -> dict[tuple[str, int], frozenset[str]]:
    """(what stands before a number, the number) -> what stands behind it, for every number in a name."""
    found: dict[tuple[str, int], set[str]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            found.setdefault((name[: match.start()], int(match[0])), set()).add(name[match.end() :])
    return {key: frozenset(parts) for key, parts in found.items()}


def _why_missing(model: Any, missing: Sequence[str]) -> str:
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if set(missing) <= tied and not getattr(model.config, "tie_word_embeddings", False):
        return (
            "config.json says tie_word_embeddings: false, and transformers would fill it with random numbers: if it is "
            "the embedding, say true there"
        )
    return "Does config.json belong to these weights, and is every shard there?"


def _why_shape(model: Any, meant: Sequence[int], found: Sequence[int]) -> str:
    config: Any = getattr(model, "config", None)
    text = text_config(config)
    size = getattr(text, "vocab_size", None)
    if len(meant) == len(found) and meant[0] == size and found[0] != size and list(meant[1:]) == list(found[1:]):
        return (
            f"config.json says vocab_size {size}, the file has {found[0]} rows, so transformers refuses it too: if the "
            f"vocabulary was changed on purpose, say vocab_size {found[0]} there"
        )
    return "Does config.json belong to these weights?"
