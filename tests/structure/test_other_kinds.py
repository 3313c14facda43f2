"""Smaller models of other kinds, by the batches that their user gives: speech, two towers, hybrids, classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.families import DEEPSEEK, GQA
from support.folders import load
from support.kinds import batch, build, needs_type, run, save
from support.zeroed import zeroed_model
from torch.testing import assert_close

import sparsify
from sparsify.errors import SpecError, TraceError

INNER, KEY_VALUE = {"intermediate_size": 32}, {"num_attention_heads": 2, "num_key_value_heads": 1}
BESIDE = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
# What a config comes to say. Heads that are not among it stay: their size is the width divided by their number.
SAYS: dict[str, dict[str, int]] = {
    "whisper": BESIDE,
    "clip": {**INNER, "vision_config.intermediate_size": 32},
    # The convolution's width is the residual one: it stays whole, and nothing else suffers for it.
    "lfm2": {**INNER, **KEY_VALUE, "head_dim": 8},
    # The vision tower is not reached by text: it stays as it is, as does the projector between the two.
    "llava": {**INNER, **KEY_VALUE},
    # With images, some sizes in the graph are of an image; nothing that they touch is cut.
    "qwen2_vl": INNER,
    "siglip": {**INNER, "vision_config.intermediate_size": 32},
    "marian": BESIDE,
    "falcon_h1": {**INNER, **KEY_VALUE},
    "wav2vec2": INNER,
    "hubert": INNER,
    "classifier": {**INNER, **KEY_VALUE},
    "reward": {**INNER, **KEY_VALUE},
    "embedding": {**INNER, **KEY_VALUE},
}
QUICK = ("whisper", "clip", "lfm2", "llava")
KINDS = [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SAYS if kind not in QUICK)]


@pytest.mark.first(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_model_is_the_dense_one_with_zeros(kind: str, tmp_path: Path) -> None:
    dense, given = save(kind, tmp_path / "dense"), batch(kind)
    result = sparsify.compile(dense, ["llm-pruner:50%,importance=l2"], calibration=[given], output=tmp_path / "out")
    (done,), small = result.structure, load(tmp_path / "out")
    assert done.config == SAYS[kind]
    assert_close(run(small, given), run(zeroed_model(dense, done), given), rtol=1e-4, atol=1e-5)
    # What the trace does not reach counts too.
    assert sum(p.numel() for p in small.parameters()) == done.parameters[1] < done.parameters[0]
    if kind == "llava":
        before, after = json.loads((dense / "config.json").read_text()), small.config
        assert after.vision_config.intermediate_size == before["vision_config"]["intermediate_size"]


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("whisper", "marian", "classifier")]
)
def test_by_gradients(kind: str, tmp_path: Path) -> None:
    dense, given = save(kind, tmp_path / "dense"), batch(kind)
    result = sparsify.compile(dense, ["llm-pruner:50%"], calibration=[given], output=tmp_path / "out")
    small = load(tmp_path / "out")
    assert_close(run(small, given), run(zeroed_model(dense, result.structure[0]), given), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_experts_beside_shared_ones_of_several_times_their_width(tmp_path: Path) -> None:
    """The config says the width of one: two shared experts are one matrix of twice as many channels."""
    torch.manual_seed(0)
    model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**DEEPSEEK, "n_shared_experts": 2})).eval()
    model.save_pretrained(tmp_path / "dense")
    result = sparsify.compile(tmp_path / "dense", ["llm-pruner:50%,importance=l2"], output=tmp_path / "out")
    small, given = load(tmp_path / "out"), {"input_ids": torch.arange(3, 19)[None]}
    assert (small.config.moe_intermediate_size, small.config.n_shared_experts) == (8, 2)
    assert_close(run(small, given), run(zeroed_model(tmp_path / "dense", result.structure[0]), given))


@pytest.mark.slow
@needs_type("minicpm_ocr_vision")
def test_a_layer_beside_the_blocks_of_four_times_their_width(tmp_path: Path) -> None:
    """Four patches become one in a layer as much wider than the blocks', by the same field of the config."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(
        "minicpm_ocr_vision", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, insert_layer_id=0,
    )  # fmt: skip
    hf.AutoModel.from_config(config).eval().save_pretrained(tmp_path / "dense")
    given = {"pixel_values": torch.randn(1, 3, 8, 256), "target_sizes": torch.tensor([[4, 4], [4, 4]])}
    result = sparsify.compile(
        tmp_path / "dense", ["llm-pruner:50%,importance=l2"], calibration=[given], output=tmp_path / "out"
    )
    small = load(tmp_path / "out")
    assert small.vit_merger.linear_1.out_features == 128 and small.config.intermediate_size == 32
    assert_close(run(small, given), run(zeroed_model(tmp_path / "dense", result.structure[0]), given))


def test_a_narrow_layer_stays_whole_and_is_named(tmp_path: Path) -> None:
    """Of eight channels in eights none would be left: the heads go all the same."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GQA, "intermediate_size": 8})).eval()
    model.save_pretrained(tmp_path / "dense")
    result = sparsify.compile(tmp_path / "dense", ["llm-pruner:50%,importance=l2"], output=tmp_path / "out")
    (done,), given = result.structure, {"input_ids": torch.arange(3, 19)[None]}
    assert {cut.kind for cut in done.cuts} == {"heads"}
    assert all("of 8 channels in multiples of 8 none would be left" in left.reason for left in done.skipped)
    assert len(done.skipped) == 2
    assert_close(run(load(tmp_path / "out"), given), run(zeroed_model(tmp_path / "dense", done), given))


def test_without_a_loss_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no logits.*importance=l2"):
        sparsify.compile(build("clip"), ["llm-pruner:50%"], calibration=[batch("clip")], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_by_the_users_own_batches(tmp_path: Path) -> None:
    model = build("whisper")
    planned = sparsify.compile(model, ["llm-pruner:50%", "wanda:2:4"], calibration=[batch("whisper")], dry_run=True)
    assert [(c.kind, c.before, c.after) for c in planned.structure[0].cuts] == [("channels", 64, 32)] * 4
    # None are given: the config tells enough.
    assert sparsify.compile(model, ["wanda:2:4"], dry_run=True).runs[0].targets


def test_the_width_of_embeddings_stays(tmp_path: Path) -> None:
    """The pooling beside a sentence-transformers model names it."""
    dense = save("tagger", tmp_path / "dense")
    (dense / "modules.json").write_text('[{"idx": 1, "name": "1", "path": "1_Pooling", "type": "Pooling"}]')
    with pytest.raises(SpecError, match=r"modules\.json beside the model"):
        sparsify.compile(dense, ["llm-pruner:25%,importance=l2,granularity=channel"], dry_run=True)
    sparsify.compile(dense, ["llm-pruner:50%,importance=l2"], dry_run=True)
