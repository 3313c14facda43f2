"""GGUF files: equal to transformers' reading of them bit for bit, with the config and the tokenizer that it makes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from support.command_line import sparsify as run

pytest.importorskip("gguf", reason="gguf is not installed (the extra quantized)")
from support import quantized

import sparsify
from sparsify.errors import CheckpointError
from sparsify.frontend.source import open_source

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def reference(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    # transformers leaves some widths at its defaults; ours are those of the file.
    config = open_source(file).config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, config=config
    )
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    file = quantized.gguf(tmp_path / "tiny.gguf", kind=kind, tokens=False)
    want, weights = reference(file, torch.bfloat16), open_source(file).weights
    for name in weights.parameters():
        assert torch.equal(weights.read(name), want[name]), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_large_blocks_equal_transformers(kind: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    file = quantized.gguf(tmp_path / "tiny.gguf", kind=kind, tokens=False, model=model)
    want, weights = reference(file, torch.bfloat16), open_source(file).weights
    for name in weights.parameters():
        assert torch.equal(weights.read(name), want[name]), name


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_architectures_equal_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    file = quantized.gguf(tmp_path / "tiny.gguf", family, tokens=False)
    want, source = reference(file, getattr(torch, dtype)), open_source(file, dtype=dtype)
    assert set(source.weights.parameters()) == set(want)
    for name in source.weights.parameters():
        assert torch.equal(source.weights.read(name), want[name]), name


def test_pruned_at_the_command_line(tmp_path: Path) -> None:
    file = quantized.gguf(tmp_path / "here" / "tiny.gguf")
    told = run("compile", file, "--pass", "magnitude:2:4", "--dtype", "float16", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "tiny is quantized (gguf, " in told.stdout and "dense, in float16" in told.stdout
    out = tmp_path / "tiny-magnitude-2-4"
    manifest = json.loads((out / "sparsify.json").read_text())
    assert manifest["quantized_source"]["method"] == "gguf"
    assert manifest["quantized_source"]["stored_bytes"] == file.stat().st_size
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float16
    tokens = transformers.AutoTokenizer.from_pretrained(out)
    assert tokens.bos_token_id == 1 and len(tokens) == 64
    for name, parameter in model.named_parameters():
        if "proj" in name:
            assert (parameter.reshape(-1, 4) != 0).sum(1).le(2).all()
    assert run("verify", out).returncode == 0
    refused = run("verify", file)
    assert refused.returncode == 1 and "a GGUF file" in refused.stderr


def test_the_folder_beside_the_weights_goes_with_them(tmp_path: Path) -> None:
    source = open_source(quantized.gguf(tmp_path / "tiny.gguf"))
    folder = source.folder
    assert folder is not None and (folder / "config.json").exists()
    del source
    assert not folder.exists()


def test_a_module_of_it_and_a_smaller_one(tmp_path: Path) -> None:
    file = quantized.gguf(tmp_path / "tiny.gguf", tokens=False)
    model = sparsify.load(file, dtype=torch.float32)
    want = reference(file, torch.float32)
    assert all(torch.equal(p, want[n]) for n, p in model.named_parameters())
    ids = [torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))]
    made = sparsify.compile(file, ["llm-pruner:25%"], calibration=ids, output=tmp_path / "out")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert made.manifest["quantized_source"]["method"] == "gguf"


def test_rotary_factors_that_transformers_leaves_are_said(tmp_path: Path) -> None:
    file = quantized.gguf(tmp_path / "tiny.gguf", tokens=False, more={"rope_freqs.weight": torch.ones(4)})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        open_source(file)
    assert any("rope_freqs.weight" in str(each.message) for each in told)


def test_a_stack_of_experts_is_written_and_loads(tmp_path: Path) -> None:
    file = quantized.gguf(tmp_path / "tiny.gguf", "qwen3_moe", tokens=False)
    sparsify.compile(file, ["magnitude:50%"], output=tmp_path / "out", only=["*q_proj*"])
    model, want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), reference(file, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "q_proj" not in name:
            assert torch.equal(parameter, want[name]), name


def test_a_folder_that_holds_one_says_how_to_name_it(tmp_path: Path) -> None:
    quantized.gguf(tmp_path / "here" / "tiny.gguf")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        open_source(tmp_path / "here")
