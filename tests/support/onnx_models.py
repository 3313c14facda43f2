"""What the tests of ONNX share: models that never end a text, exported once per session, and torch's answers."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.families import build
from torch import Tensor

import sparsify
from sparsify.backends.onnx.backend import ONNX


def endless(family: str) -> Any:
    """A tiny model without an end-of-text token, so that greedy texts have one length."""
    model = build(family)
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    return model


def shallow(family: str) -> Any:
    """The same with one block: half as long to trace."""
    model = endless(family)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    return type(model)(config).eval()


def export(family: str, folder: Path, **options: Any) -> tuple[Any, Path]:
    """The model, and the folder that ``--to onnx`` wrote from its checkpoint."""
    model = endless(family)
    model.save_pretrained(folder / "dense")
    sparsify.compile(folder / "dense", to=ONNX(**options), output=folder / "onnx")
    return model, folder / "onnx"


def padded(rows: int = 2, length: int = 12, pad: int = 5) -> tuple[Tensor, Tensor]:
    """Ids and mask, the first row padded on the left."""
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return ids * mask, mask


def greedy(model: Any, ids: Tensor, mask: Tensor, tokens: int) -> np.ndarray:
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return out[:, ids.shape[1] :].numpy()


def logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    more = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **more).logits
