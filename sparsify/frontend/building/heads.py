"""The class of a model whose config names none: the one whose parameters are the tensors of the folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from sparsify.errors import CheckpointError
from sparsify.frontend.complete import may_be_missing
from sparsify.frontend.matching import place
from sparsify.host import quiet
from sparsify.ir.weights import tied_names

# transformers' tables of classes by config, what most users mean first: of two that fit equally well the first is it.
# A decoder whose head is tied fits with and without it, and is a language model then, as pipelines take it.
_TABLES = (
    "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "MASKED_LM",
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE",
    "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION",
    "PRETRAINING", "MULTIMODAL_LM", "TEXT_ENCODING",
)  # fmt: skip


def name_class(config: Any, names: Iterable[str]) -> None:
    """Let ``config``, where it names no class that transformers or the model's own code has, name the one that fits
    tensors of these ``names`` best: no parameter may be without one; of those the fewest tensors may be left over, and
    the most be called as the parameter is.

    Where none fits it names none.
    """
    said = config.architectures
    said = [said] if isinstance(said, str) else said or []
    if getattr(config, "auto_map", None):
        return
    if said and isinstance(said[0], str) and hasattr(transformers, said[0]):
        config.architectures = list(said)
        return
    names, config.architectures = list(names), None
    best: tuple[tuple[int, int], str] | None = None
    for kind in _classes(config):
        try:
            # Classes that it is not have advice that is not about the user's command.
            with quiet(), torch.device("meta"):
                model = built(kind, config, torch.float32, names)
        except CheckpointError:
            raise
        except Exception:  # (a class that cannot be built of this config is not it)
            continue
        rank = _rank(model, names)
        if rank is not None and (best is None or rank > best[0]):
            best = rank, kind.__name__
        if rank == (0, len(names)):
            break
    if best is not None:
        config.architectures = [best[1]]


def built(kind: Any, config: Any, dtype: torch.dtype, names: Iterable[str] | None = None) -> nn.Module:
    """A model of the class ``kind``; an encoder without a pooler where none of the tensors ``names`` is one's."""
    model: nn.Module = kind._from_config(config, dtype=dtype)
    pooled = names is None or any("pooler." in name for name in names)
    if pooled or "add_pooling_layer" not in inspect.signature(kind.__init__).parameters:
        return model
    # A pooler without weights (Swin's, which takes a mean) is in no file.
    if not any("pooler." in name for name in model.state_dict()):
        return model
    bare: nn.Module = kind._from_config(config, dtype=dtype, add_pooling_layer=False)
    return bare


def is_of(kind: Any, config: Any) -> bool:
    """Whether a table of transformers has the class ``kind`` for configs like ``config``."""
    from transformers.models.auto import modeling_auto

    names = [name for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    known = (getattr(modeling_auto, name).get(config.model_type, ()) for name in names)
    return any(kind.__name__ in (found if isinstance(found, (tuple, list)) else (found,)) for found in known)


def _classes(config: Any) -> list[Any]:
    from transformers.models.auto import modeling_auto

    found: dict[Any, None] = {}
    tables = [*(f"MODEL_FOR_{name}_MAPPING" for name in _TABLES), "MODEL_MAPPING"]
    for table in tables:
        known = getattr(modeling_auto, table, {}).get(type(config), ())
        found |= dict.fromkeys(known if isinstance(known, (tuple, list)) else (known,))
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if masked is not None and causal in found and not getattr(config, "is_decoder", False):
        # An encoder has a class as a decoder too, of the same parameters.
        order = [k for k in found if k is not causal]
        order.insert(order.index(masked) + 1, causal)
        return order
    return list(found)


def _rank(model: nn.Module, names: list[str]) -> tuple[int, int] | None:
    """(minus the tensors that are left over, those of the very name); None where a parameter has no tensor."""
    placed, aliases = place(model, names), tied_names(model)
    held = {aliases.get(name, name) for name in placed.renamed}
    for conversion in placed.groups.values():
        held |= {aliases.get(name, name) for name in _made_by(conversion.converter, conversion.targets[0])}
    optional = may_be_missing(model)
    if any(aliases.get(name, name) not in held and not optional(name) for name in model.state_dict()):
        return None
    return -len(placed.unknown), placed.exact


def _made_by(converter: Any, first: str) -> list[str]:
    """The parameters of a conversion, of which ``first`` is one: it has a name for each of its targets."""
    targets = list(converter.target_patterns)
    stem = next((t for t in targets if t.replace("\\", "") in first), None)
    return [first] if stem is None else [first.replace(stem, target) for target in targets]
