"""Smaller models as transformers loads them: the dense ones with zeros, made again from the list of cuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, inputs, run, save
from support.folders import load
from support.zeroed import zeroed_model
from torch import Tensor, nn

import sparsify
from sparsify.errors import BackendError, SpecError
from sparsify.files.checkpoint import Checkpoint
from sparsify.structure.replay import replay

# tests/structure/test_config.py has those whose config cannot say it.
REFUSED = ("bloom", "convnext", "mamba2")
QUICK = ("llama", "gpt2", "mixtral")
SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in (*QUICK, *REFUSED)]


@pytest.mark.first(1)
@pytest.mark.parametrize("family", [*QUICK, *SLOW])
def test_a_smaller_model_is_the_dense_one_with_zeros(
    family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = folder(family)
    result = sparsify.compile(dense, ["llm-pruner:50%,importance=l2"], output=tmp_path / "out")
    small, (before, after) = load(tmp_path / "out"), result.structure[0].parameters
    assert sum(p.numel() for p in small.parameters()) == after < before
    exact = run(zeroed_model(dense, result.structure[0]), inputs(family))
    torch.testing.assert_close(run(small, inputs(family)), exact, rtol=1e-4, atol=1e-5)
    # The list in sparsify.json makes the same files of the dense checkpoint.
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    (record,) = manifest["structure"]
    again = replay(dense, record["cuts"], tmp_path / "again", record["config"])
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_residual_width(family: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    dense = folder(family)
    result = sparsify.compile(dense, ["llm-pruner:25%,importance=l1,granularity=channel"], output=tmp_path / "out")
    small = load(tmp_path / "out")
    assert small.config.hidden_size == 24 and small.config.head_dim == 8
    assert [c.kind for c in result.structure[0].cuts] == ["width"]
    assert bool(run(small, inputs(family)).isfinite().all())


def test_then_zeros_then_a_backend(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    dense = folder("llama")
    passes = ["llm-pruner:50%,importance=taylor-mix", "wanda:2:4"]
    result = sparsify.compile(dense, passes, calibration=[ids], output=tmp_path / "out")
    small = load(tmp_path / "out")
    assert small.config.intermediate_size == 32 and result.runs[0].kept == 0.5
    weight = small.model.layers[0].mlp.up_proj.weight
    assert weight.shape == (32, 32) and int((weight.view(-1, 4) != 0).sum(1).max()) == 2
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert manifest["structure"][0]["spec"] == passes[0] and manifest["passes"][0]["spec"] == "wanda:2:4"
    kept = sparsify.compile(dense, ["llm-pruner:50%,importance=l2"])
    assert kept.output is None and kept.model.config.intermediate_size == 32
    assert kept.weight("model.layers.0.mlp.up_proj.weight").shape == (32, 32)


def test_a_model_in_memory_and_shards(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(folder("llama"))
    result = sparsify.compile(model, ["llm-pruner:50%,importance=l2"], output=tmp_path / "out")
    assert load(tmp_path / "out").config.intermediate_size == 32 and model.config.intermediate_size == 64
    assert result.source.name == "llamaforcausallm"
    save("mixtral", tmp_path / "shards", max_shard_size="40KB")
    sparsify.compile(tmp_path / "shards", ["llm-pruner:50%,importance=l2"], output=tmp_path / "small")
    assert [f.name for f in Checkpoint(tmp_path / "small").files] == [
        f.name for f in Checkpoint(tmp_path / "shards").files
    ]
    assert load(tmp_path / "small").config.intermediate_size == 32


def test_what_is_refused(folder: Callable[[str], Path], tmp_path: Path, ids: Tensor) -> None:
    dense = folder("llama")
    out = tmp_path / "out"
    for passes, options, error, match in (
        (["wanda:2:4", "llm-pruner:50%"], {}, SpecError, "structural passes first"),
        (["llm-pruner:99%,importance=l2"], {}, SpecError, "none would be left"),
        (["llm-pruner:50%,importance=l2"], {"only": ["layers.9*"]}, SpecError, "layers.9"),
        (["llm-pruner:50%,importance=l2"], {"ignore": ["model.layers.0.mlp*"]}, BackendError, "config.json cannot say"),
        (["llm-pruner:50%,importance=l2"], {"only": ["*q_proj"]}, SpecError, "nothing that can be removed"),
    ):
        with pytest.raises(error, match=match):
            sparsify.compile(dense, passes, output=out, **options)  # type: ignore[arg-type]
        assert not out.exists()
    with pytest.raises(BackendError, match="not a transformers model"):
        sparsify.compile(nn.Linear(8, 8), ["llm-pruner:50%,importance=l2"], calibration=[torch.randn(2, 8)])
