"""``cache=none``: models that generate, as graphs of the whole text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.onnx_models import endless, greedy, padded, shallow

from sparsify.backends.onnx import export_onnx, trace_onnx
from sparsify.backends.onnx.options import Options
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import SparsifyError
from sparsify.files.manifest import read_manifest


@pytest.mark.slow
def test_a_graph_without_a_cache_gives_the_same_texts(written: Callable[[str, str], Path]) -> None:
    folder = written("llama", "onnx:cache=none")
    assert read_manifest(folder)["onnx"] | {"kind": "uncached", "cache": "none"} == read_manifest(folder)["onnx"]
    assert not (folder / "genai_config.json").exists()
    runner = Runner(folder)
    assert not runner.past and set(runner.inputs) == {"input_ids", "attention_mask"}
    ids, mask = padded()
    got = np.stack(list(runner.generate(ids[1:].numpy(), tokens=12)), 1)
    from support.folders import load

    assert (got == greedy(load(folder), ids[1:], mask[1:], 12)).all()
    with pytest.raises(SparsifyError, match="padding among the text"):
        next(runner.generate(ids.numpy(), mask.numpy(), tokens=2))
    assert (checked := verify_onnx(folder)).sound, checked.problems


@pytest.mark.slow
def test_encoders_do_not_generate_for_all_that(tmp_path: Path) -> None:
    from support.plain_models import save_plain

    import sparsify

    sparsify.compile(save_plain("bert classifier", tmp_path / "dense"), to="onnx:cache=none", output=tmp_path / "out")
    with pytest.raises(SparsifyError, match="without a cache"):
        Runner(tmp_path / "out")


@pytest.mark.slow
def test_a_graph_is_traced_without_a_cache(tmp_path: Path) -> None:
    model = shallow("llama")
    traced = trace_onnx(model, cache="none")
    with pytest.raises(SparsifyError, match="has the inputs that it was traced with"):
        export_onnx(traced, tmp_path / "out", cache="none")
    export_onnx(traced, tmp_path / "out")
    ids = torch.randint(3, 60, (3, 9))
    got, _ = Runner(tmp_path / "out").forward(ids.numpy(), np.ones((3, 9), np.int64), {})
    with torch.no_grad():
        assert np.abs(got - model(ids).logits.numpy()).max() <= 1e-5
    assert Options().cache == "keep" and endless("llama") is not None
