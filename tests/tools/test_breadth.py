"""The table of architectures: made from its results, and its results are what the tool finds now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth.hooks import expected_mask
from breadth.kinds import main_class, model_types
from breadth.model import Unusable, build, differ
from breadth.shrink import VOCABULARY, tiny_config
from breadth.table import RESULTS, TABLE, installed, table, verdicts
from breadth.trial import check
from support.kinds import needs_type

HF = ("buffers", "capture", "masks", "untouched", "reload")
KEPT: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
# None of them is in tests/support/families.py.
QUICK = ("clip", "whisper", "granite")
SLOW = (
    "llava", "qwen2_5_vl", "roberta", "siglip", "wav2vec2",
    "albert", "apertus", "bart", "beit", "blenderbot", "cohere2", "deberta-v2", "deit", "dinov2", "distilbert",
    "electra", "ernie4_5", "exaone4", "gemma3", "glm4", "gptj", "granitemoe", "hubert", "internvl", "lfm2",
    "llava_next", "mbart", "mistral3", "modernbert", "mpnet", "mpt", "olmo2", "paligemma", "pegasus", "phi",
    "qwen2_moe", "qwen2_vl", "qwen3_vl", "resnet", "seed_oss", "smollm3", "stablelm", "starcoder2", "swin", "xglm",
)  # fmt: skip


def test_the_table_is_of_the_results() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), "python tools/breadth table > docs/architectures.md"


def test_the_results_name_all_types_of_the_pinned_transformers() -> None:
    if installed()["transformers"] != KEPT["versions"]["transformers"]:
        pytest.skip(f"the results are of transformers {KEPT['versions']['transformers']}")
    assert KEPT["types"].keys() | set(KEPT["left"]) == set(model_types())


def test_each_refusal_has_its_reason_and_nothing_is_wrong_in_silence() -> None:
    for kind, result in KEPT["types"].items():
        for step in result["steps"].values():
            assert step["verdict"] == "right" or step["reason"], kind


@pytest.mark.first(14)
@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_a_type_comes_out_as_the_table_says(kind: str, tmp_path: Path) -> None:
    found = check(kind, tmp_path, HF)
    if installed() == KEPT["versions"]:
        kept = KEPT["types"][kind]["steps"]
        assert {n: s["verdict"] for n, s in found.items()} == {n: kept[n]["verdict"] for n in found}, found
    else:
        # Of other versions nothing is promised but that nothing is wrong in silence.
        assert not [s for s in found.values() if s["verdict"] in ("wrong", "traceback")], found


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("gradium_phonon_tts", marks=needs_type("gradium_phonon_tts")),
        pytest.param("ernie4_5_vl_moe", marks=pytest.mark.slow),
    ],
)
def test_tensors_of_several_parameters_and_of_heads_come_out_smaller(kind: str, tmp_path: Path) -> None:
    """transformers turns the first's projections round by the number of heads, and makes two parameters of the
    second's experts at once: of a smaller model both are other tensors."""
    found = check(kind, tmp_path, ("structural",))["structural"]
    assert found["verdict"] == "right", found


@pytest.mark.slow
def test_what_depends_on_a_number_of_heads_says_where(tmp_path: Path) -> None:
    found = check("glm_moe_dsa", tmp_path, ("structural",))["structural"]
    assert found["verdict"] == "refused" and "mul by [0.25]" in found["reason"] and "indexer" in found["reason"], found


def test_a_config_is_tiny_and_keeps_every_kind_of_layer() -> None:
    config, _ = tiny_config("qwen3_next")
    assert config.layer_types == ["linear_attention", "full_attention"] and config.num_hidden_layers == 2
    assert config.hidden_size == 32 and config.vocab_size == VOCABULARY and config.num_experts == 4
    nested, _ = tiny_config("llava")
    assert nested.text_config.hidden_size == nested.vision_config.hidden_size == 32
    assert nested.image_token_id < VOCABULARY


def test_the_class_of_a_type_is_what_it_is_published_for() -> None:
    names = {k: main_class(k).__name__ for k in ("bert", "gpt2", "t5", "llava", "whisper", "vit", "clip_text_model")}
    assert names == {
        "bert": "BertForMaskedLM", "gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration",
        "llava": "LlavaForConditionalGeneration", "whisper": "WhisperForConditionalGeneration",
        "vit": "ViTForImageClassification", "clip_text_model": "CLIPTextModel",
    }  # fmt: skip


def test_the_reference_by_hand() -> None:
    weight, squares = torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.tensor([9.0, 1.0, 1.0, 100.0])
    # Scores 3, 3, 2, 5: of two that are alike the first goes.
    mask, close = expected_mask(weight, squares)
    assert mask.tolist() == [[True, False, True, False]] and close.tolist() == [[True]]


def test_outputs_that_differ() -> None:
    one = [torch.tensor([1.0, float("inf")]), torch.tensor([3])]
    assert differ(one, [t.clone() for t in one]) == 0
    assert differ(one, [torch.tensor([1.5, float("inf")]), torch.tensor([3])]) == pytest.approx(1 / 3)
    assert differ(one, one[:1]) == differ(one, [one[0], torch.tensor([4])]) == float("inf")
    assert differ([torch.tensor([1.0])], [torch.tensor([float("nan")])]) == float("inf")


def test_the_worst_step_is_the_column() -> None:
    steps = {name: {"verdict": "right"} for name in HF} | {
        "masks": {"verdict": "refused"},
        "onnx": {"verdict": "wrong"},
    }
    assert verdicts({"steps": steps}) == {"hf": "refused", "packed": "–", "onnx": "wrong", "structural": "–"}


@pytest.mark.parametrize(("kind", "why"), [("qwen2_5_omni", "has no forward"), ("sam2_video", "a session object")])
def test_a_type_that_cannot_be_tried_says_why(kind: str, why: str) -> None:
    with pytest.raises(Unusable, match=why):
        build(kind)
