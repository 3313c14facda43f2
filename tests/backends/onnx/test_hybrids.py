"""Models whose layers keep different things of past tokens: one step with all of them, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers as hf
from support.families import DEEPSEEK
from support.onnx_models import greedy, logits, padded
from support.recurrent import recurrent

import sparsify
from sparsify.backends.onnx.running.runner import Runner
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.errors import BackendError

# Recurrent layers beside attention; both in one layer; layers that keep nothing; weights joined in the graph.
HYBRIDS = ["bamba", "falcon_h1", "jamba", "kimi_linear", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_next", "zamba"]


@pytest.mark.first(2)
@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_gives_the_tokens_and_logits_of_transformers(family: str, tmp_path: Path) -> None:
    # So many layers that one of them is of the other kind.
    model = recurrent(
        family, {"falcon_h1": 2, "qwen3_next": 4, "qwen3_5": 4, "olmo_hybrid": 4, "kimi_linear": 5}.get(family, 3)
    )
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "dense")
    result = sparsify.compile(tmp_path / "dense", to="onnx", output=tmp_path / "out")
    assert any(", step, " in note for note in result.notes), result.notes
    runner = Runner(tmp_path / "out")
    ids, mask = padded()
    got = np.stack(list(runner.generate(ids.numpy(), mask.numpy(), tokens=12)), 1)
    assert (got == greedy(model, ids, mask, 12)).all()
    whole, _ = runner.forward(ids.numpy(), mask.numpy(), runner.empty(2))
    assert np.abs(whole - logits(model, ids, mask).numpy())[mask.numpy() == 1].max() <= 1e-5
    assert (checked := verify_onnx(tmp_path / "out")).sound, checked.problems
    kinds = {name.partition(".")[0] for name in runner.past}
    assert {"past_key_values", "past_conv", "past_recurrent"} == kinds
    assert len(runner.past) == len(set(runner.past)) == len(set(runner.present))


def deepseek(folder: Path) -> Path:
    # Few heads give scores of exactly zero, between which torch and onnxruntime choose as they like.
    index = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}
    model = hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(**DEEPSEEK, **index)).eval()
    model.save_pretrained(folder)
    return folder


def test_layers_that_no_graph_can_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"its layers keep indexed_attention \(2 layers\).*cache=none"):
        sparsify.compile(deepseek(tmp_path / "dense"), to="onnx", output=tmp_path / "out")


@pytest.mark.slow
def test_they_can_be_left_out(tmp_path: Path) -> None:
    result = sparsify.compile(deepseek(tmp_path / "dense"), to="onnx:cache=none", output=tmp_path / "out")
    assert any("no cache" in note for note in result.notes), result.notes
    assert (checked := verify_onnx(tmp_path / "out")).sound, checked.problems


def test_loops_of_their_own_and_images_in_caches_are_refused(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    git = hf.GitForCausalLM(
        hf.GitConfig(vision_config=vision, vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                     intermediate_size=64, bos_token_id=1, eos_token_id=2))  # fmt: skip
    git.eval().save_pretrained(tmp_path / "git")
    with pytest.raises(BackendError, match="places of its cache for an image's"):
        sparsify.compile(tmp_path / "git", to="onnx", output=tmp_path / "out")
    from sparsify.backends.onnx.tracing.cached import cached_contract

    for kind, says in ((hf.MoshiForCausalLM, "its cache forgets"), (hf.Kosmos2_5ForConditionalGeneration, "positions")):
        other = kind.__new__(kind)
        object.__setattr__(other, "config", kind.config_class())
        with pytest.raises(BackendError, match=says):
            cached_contract(other, lambda function: function())
    own = hf.CsmForConditionalGeneration.__new__(hf.CsmForConditionalGeneration)
    with pytest.raises(BackendError, match="a loop of its own"):
        cached_contract(own, lambda function: function())
