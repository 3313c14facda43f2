"""What a folder is opened as whose config.json names no class, or a way of attention that is not to be had here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.families import FAMILIES, LLAMA, build, save
from support.folders import load

import sparsify
from sparsify.backends.packed.loaded.loading import load_model
from sparsify.frontend.capture import capture
from sparsify.frontend.source import open_source

TINY = {k: v for k, v in LLAMA.items() if "token_id" not in k} | {"num_hidden_layers": 1}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
MADE: dict[str, Any] = {
    **{family: lambda family=family: build(family) for family in FAMILIES},
    "llama tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, tie_word_embeddings=True)),
    "llama body": lambda: hf.LlamaModel(hf.LlamaConfig(**TINY)),
    "llama body tied": lambda: hf.LlamaModel(hf.LlamaConfig(**TINY, tie_word_embeddings=True)),
    "llama classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TINY)),
    "llama tokens": lambda: hf.LlamaForTokenClassification(hf.LlamaConfig(**TINY)),
    "bert body": lambda: hf.BertModel(hf.BertConfig(**TINY)),
    "bert without pooler": lambda: hf.BertModel(hf.BertConfig(**TINY), add_pooling_layer=False),
    "swin body": lambda: hf.SwinModel(hf.SwinConfig(**SWIN)),
    "bert pretraining": lambda: hf.BertForPreTraining(hf.BertConfig(**TINY)),
    "bert classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TINY)),
    "bert answers": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**TINY)),
    "bert decoder": lambda: hf.BertLMHeadModel(hf.BertConfig(**TINY, is_decoder=True)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "bart decoder": lambda: hf.BartForCausalLM(hf.BartConfig(**BART)),
    "t5 encoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
}


def change(folder: Path, **config: Any) -> Path:
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return folder


@pytest.mark.first(12)
@pytest.mark.parametrize("kind", MADE)
def test_the_class_whose_parameters_are_there(kind: str, tmp_path: Path) -> None:
    model = MADE[kind]()
    model.save_pretrained(tmp_path)
    source = open_source(change(tmp_path, architectures=None))
    assert type(source.module) is type(model)
    assert not source.weights.unknown and type(load_model(tmp_path)) is type(model)


def test_a_pooler_that_has_no_weights_is_in_the_graph(tmp_path: Path) -> None:
    model = MADE["swin body"]().eval()
    model.save_pretrained(tmp_path)
    batch = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    program = capture(open_source(tmp_path), batch)
    assert "pooler_output" in program.output_names
    source = open_source(save("bert", tmp_path / "bert"))
    assert "pooler_output" not in capture(source, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}).output_names


@pytest.mark.parametrize("said", [["MyOwnForCausalLM"], "LlamaForCausalLM", [], [None], ["LlamaForCausalLM", "More"]])
def test_a_class_that_nobody_has_is_none(said: object, tmp_path: Path) -> None:
    """Taken for a body without a head it would be pruned as one, the head carried along."""
    build("llama").save_pretrained(tmp_path)
    source = open_source(change(tmp_path, architectures=said))
    assert type(source.module) is hf.LlamaForCausalLM and not source.weights.unknown


@pytest.mark.parametrize("to", ["hf", pytest.param("packed:choice=smallest", marks=pytest.mark.slow)])
def test_the_output_names_it(to: str, tmp_path: Path) -> None:
    MADE["llama tied"]().save_pretrained(tmp_path / "model")
    change(tmp_path / "model", architectures=None)
    ids = [torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))]
    made = sparsify.compile(tmp_path / "model", ["gblm:2:4"], calibration=ids, to=to, output=tmp_path / "out")
    assert made.output is not None and type(load(made.output)) is hf.LlamaForCausalLM
    small = sparsify.compile(tmp_path / "model", ["llm-pruner:25%"], calibration=ids, output=tmp_path / "small")
    assert small.output is not None and type(load(small.output)) is hf.LlamaForCausalLM


def test_what_fits_nothing_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(sparsify.errors.CheckpointError, match="LlamaModel"):
        open_source(change(tmp_path, architectures=None, num_hidden_layers=3))


@pytest.mark.parametrize("said", ["flash_attention_2", "flash_attention_3", "flex_attention", "sdpa", "eager"])
def test_how_attention_is_computed_is_no_matter_of_the_weights(said: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    change(tmp_path / "model", _attn_implementation=said)
    ids = [torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))]
    made = sparsify.compile(tmp_path / "model", ["wanda:2:4"], calibration=ids, output=tmp_path / "out")
    assert made.output is not None
    assert json.loads((made.output / "config.json").read_text())["_attn_implementation"] == said
    assert made.source.config._attn_implementation == ("eager" if said == "eager" else "sdpa")


def test_attention_of_the_parts_of_a_model(tmp_path: Path) -> None:
    text = hf.LlamaConfig(**TINY)
    vision = hf.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 image_size=8, patch_size=4)  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    hf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    for part in (said, said["text_config"], said["vision_config"]):
        part["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = open_source(tmp_path).config
    assert {c._attn_implementation for c in (config, config.text_config, config.vision_config)} == {"sdpa"}


def test_a_class_that_nobody_has_is_replaced_and_that_is_said(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NopeModel"]}))
    made = sparsify.compile(folder, ["magnitude:2:4"], output=tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert any("NopeModel" in note and "LlamaForCausalLM" in note for note in made.notes)
