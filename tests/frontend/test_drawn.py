"""Parameters that a model draws where it is built, whatever device it is told: fakes in a skeleton, as all others."""

from __future__ import annotations

from pathlib import Path

import transformers as hf
from support.families import GQA
from torch._subclasses.fake_tensor import FakeTensor

from sparsify.frontend.skeleton import build_skeleton


def test_no_parameter_of_a_skeleton_has_numbers(tmp_path: Path) -> None:
    """DiffLlama's lambdas come from ``torch.normal``; real ones were constants of its ONNX file, and random."""
    hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**GQA)).save_pretrained(tmp_path)
    found = dict(build_skeleton(tmp_path).named_parameters())
    assert any("lambda" in name for name in found)
    assert all(isinstance(parameter, FakeTensor) for parameter in found.values())
