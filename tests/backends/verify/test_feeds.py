"""Inputs that a graph is tried on are of the types that it declares, whatever their names tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparsify.backends.verify.outputs.feeds import feed_for

MODEL = SimpleNamespace(config=SimpleNamespace(vocab_size=64, pad_token_id=None), dtype=torch.float16)
TYPES = {
    "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(bool)": torch.bool,
    "tensor(float16)": torch.float16,
}  # fmt: skip


@pytest.mark.parametrize("name", ["attention_mask", "prompt_masks", "position_ids", "input_ids", "pixel_values"])
@pytest.mark.parametrize("declared", TYPES)
def test_an_input_is_of_the_type_that_the_graph_declares(name: str, declared: str) -> None:
    info = SimpleNamespace(name=name, type=declared, shape=["batch", 8])
    value = feed_for([info], MODEL, 3, 7)[name]
    assert value.dtype == TYPES[declared] and value.shape == (3, 8)
    assert value.bool().any() and ("mask" not in name or not value.bool().all())
