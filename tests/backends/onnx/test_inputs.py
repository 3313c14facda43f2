"""Which of a model's inputs are inputs of its graph, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from support.families import GQA
from support.plain_models import differences, feed, plain, save_plain

import sparsify
from sparsify.backends.onnx.running.session import open_session
from sparsify.backends.verify.onnx_folder import verify_onnx
from sparsify.files.manifest import read_manifest

NAME = "bert classifier"


def add_tokenizer(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    hf.BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_segments_are_an_input_where_the_tokenizer_gives_them(tmp_path: Path) -> None:
    source = add_tokenizer(save_plain(NAME, tmp_path / "dense"))
    result = sparsify.compile(source, to="onnx", output=tmp_path / "out")
    session = open_session(tmp_path / "out" / "model.onnx")
    assert {i.name for i in session.get_inputs()} == {"input_ids", "attention_mask", "token_type_ids"}
    assert not any("defaults" in note for note in result.notes)
    assert read_manifest(tmp_path / "out")["onnx"]["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    for rows, length in ((1, 9), (2, 9), (5, 4)):
        assert max(differences(session, plain(NAME), rows, length).values()) <= 2e-6
    # A text of two segments as the tokenizer makes it, and what the segments do to it.
    pair = hf.AutoTokenizer.from_pretrained(tmp_path / "out")("a b c", "d e", return_tensors="np")
    assert pair["token_type_ids"].max() == 1
    two = session.run(None, dict(pair))[0]
    one = session.run(None, {**pair, "token_type_ids": np.zeros_like(pair["token_type_ids"])})[0]
    with torch.no_grad():
        want = plain(NAME)(**{name: torch.from_numpy(value) for name, value in pair.items()}).logits.numpy()
    assert np.abs(two - want).max() <= 2e-6 and np.abs(one - want).max() > 1e-5
    assert (checked := verify_onnx(tmp_path / "out")).sound, checked.problems


@pytest.mark.slow
def test_what_no_tokenizer_names_stays_at_its_default_and_is_named(tmp_path: Path) -> None:
    model = plain(NAME)
    result = sparsify.compile(save_plain(NAME, tmp_path / "dense"), to="onnx", output=tmp_path / "out")
    assert any("defaults: token_type_ids" in note for note in result.notes), result.notes
    assert read_manifest(tmp_path / "out")["onnx"]["frozen"] == ["token_type_ids"]
    session = open_session(tmp_path / "out" / "model.onnx")
    assert {i.name for i in session.get_inputs()} == {"input_ids", "attention_mask"}
    assert max(differences(session, model, 2, 9).values()) <= 2e-6


@pytest.mark.slow
def test_batches_given_in_python_make_inputs_too(tmp_path: Path) -> None:
    batch = feed(["input_ids", "token_type_ids"], 2, 8)
    sparsify.compile(plain(NAME), to="onnx", output=tmp_path / "out", calibration=[batch])
    session = open_session(tmp_path / "out" / "model.onnx")
    assert "token_type_ids" in {i.name for i in session.get_inputs()}
    assert max(differences(session, plain(NAME), 5, 12).values()) <= 2e-6


def llava() -> Any:
    torch.manual_seed(0)
    text = hf.LlamaConfig(**{**GQA, "num_hidden_layers": 1}, tie_word_embeddings=False)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def test_of_a_model_with_images_the_graph_is_the_language_model_alone(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "dense")
    result = sparsify.compile(tmp_path / "dense", ["magnitude:2:4"], to="onnx", output=tmp_path / "out")
    assert any("language model alone" in note and "pixel_values" in note for note in result.notes), result.notes
    assert read_manifest(tmp_path / "out")["onnx"]["part"] == "language model"
    checked = verify_onnx(tmp_path / "out")
    assert checked.sound and checked.behaviour is not None, (checked.problems, checked.unchecked)
    assert checked.behaviour.agreeing == checked.behaviour.tokens


@pytest.mark.slow
def test_what_there_is_of_every_token_is_as_long_as_the_text(tmp_path: Path) -> None:
    """Boxes on a page, given with the calibration data and named by no tokenizer."""
    config = hf.LayoutLMConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    model = hf.LayoutLMForTokenClassification(config).eval()
    model.save_pretrained(tmp_path / "dense")
    batch = {"input_ids": torch.randint(1, 60, (2, 16)), "bbox": torch.tensor([1, 2, 5, 7]).expand(2, 16, 4)}
    sparsify.compile(tmp_path / "dense", calibration=[batch], to="onnx", output=tmp_path / "out")
    session = open_session(tmp_path / "out" / "model.onnx")
    assert {i.name: i.shape for i in session.get_inputs()}["bbox"] == ["batch_size", "sequence_length", 4]
    other = {n: v[:1, :7].contiguous() for n, v in batch.items()} | {"attention_mask": torch.ones(1, 7).long()}
    with torch.no_grad():
        want = model(**other).logits.numpy()
    assert np.abs(session.run(None, {n: v.numpy() for n, v in other.items()})[0] - want).max() <= 2e-6
    assert (checked := verify_onnx(tmp_path / "out")).sound, checked.problems


@pytest.mark.slow
def test_a_series_of_past_values_is_no_cache(tmp_path: Path) -> None:
    config = hf.PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, num_hidden_layers=1, d_model=16,
        num_attention_heads=2, ffn_dim=32, prediction_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.PatchTSTForPrediction(config).eval().save_pretrained(tmp_path / "dense")
    batch = {"past_values": torch.randn(2, 16, 2)}
    sparsify.compile(tmp_path / "dense", calibration=[batch], to="onnx", output=tmp_path / "out")
    checked = verify_onnx(tmp_path / "out")
    assert checked.sound and checked.behaviour is not None, checked.problems


@pytest.mark.slow
def test_outputs_in_a_tuple_are_outputs(tmp_path: Path) -> None:
    """The three readings of MGP-STR, which are all that it gives."""
    config = hf.MgpstrConfig(
        image_size=[16, 32], patch_size=8, max_token_length=5, num_character_labels=7, num_bpe_labels=11,
        num_wordpiece_labels=13, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.MgpstrForSceneTextRecognition(config).eval().save_pretrained(tmp_path / "dense")
    batch = {"pixel_values": torch.randn(2, 3, 16, 32)}
    sparsify.compile(tmp_path / "dense", calibration=[batch], to="onnx", output=tmp_path / "out")
    session = open_session(tmp_path / "out" / "model.onnx")
    assert [o.name for o in session.get_outputs()] == ["logits.0", "logits.1", "logits.2"]
    checked = verify_onnx(tmp_path / "out")
    assert checked.sound and checked.behaviour is not None, checked.problems
